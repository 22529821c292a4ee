"""A user study: raters see two results of one picture side by side and choose. `coherent-ddrm study`, docs/study.md."""
