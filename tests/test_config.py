import pytest

from coherent_ddrm.config import (
    ConfigError,
    DiffusionRun,
    StructureRun,
    config_hash,
    dump_config,
    parse_run,
    read_config,
)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path):
    path = write(tmp_path, "seed: 5\noptim: {lr: 3e-4, batch: 16}\n")
    overrides = ["--optim.batch", "8", "--data.flip", "False", "--dry-run"]
    run, invocation = parse_run(DiffusionRun, ["--config", str(path), *overrides])
    assert (run.seed, run.optim.lr, run.optim.batch, run.optim.steps) == (5, 3e-4, 8, DiffusionRun().optim.steps)
    assert invocation.dry_run and not run.data.flip


def test_every_fault_is_listed_with_its_key(tmp_path):
    path = write(tmp_path, "optim: {lrr: 1, steps: many}\nmodel: {size: 3}\nsede: 1\n")
    with pytest.raises(ConfigError) as error:
        read_config(DiffusionRun, path)
    text = str(error.value)
    assert "optim.lrr: unknown key; did you mean optim.lr?" in text
    assert "optim.steps" in text and "'many'" in text and "model.size" in text
    assert "sede: unknown key; did you mean seed?" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands twice (line 2)"),
        ("seed: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_config(DiffusionRun, write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [["--config", "/nowhere.yaml"], ["--config"], ["--optim.lrr", "1"], ["--seed", "x"]])
def test_command_line_faults_leave_with_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        parse_run(StructureRun, argv)
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_dumped_config_reads_back_the_same(tmp_path):
    run = DiffusionRun(seed=3)
    assert read_config(DiffusionRun, write(tmp_path, dump_config(run))) == run
    assert config_hash(run) != config_hash(DiffusionRun())
