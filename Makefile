# make demo: inpaint a few photographs with the shipped checkpoint.   make test: run the tests.
PYTHON ?= python3
export OMP_NUM_THREADS ?= 2
ACTIVE = .venv/.ready

.PHONY: demo test lint clean

demo: $(ACTIVE)
	.venv/bin/coherent-ddrm demo -o demo

test: $(ACTIVE)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

lint: $(ACTIVE)
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# uv makes the environment in seconds; where it is not installed, it is brought into .venv itself.
$(ACTIVE): pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	command -v uv >/dev/null || .venv/bin/python -m pip install --quiet uv
	VIRTUAL_ENV="$(CURDIR)/.venv" PATH="$$PATH:$(CURDIR)/.venv/bin" uv pip install --quiet -e '.[train,dev]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv demo
