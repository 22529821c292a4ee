"""Networks: the diffusion transformer of stage two and the structure predictor of stage one."""
