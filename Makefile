# `make demo` and `make test` each work on a fresh machine as the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= outputs/demo

.PHONY: demo test quality style types benchmark hub publish clean

# The virtual environment, made anew whenever a pinned version changes.
$(BIN)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# accelerate gives a process one thread unless it is told otherwise.
demo: export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
# Trains and evaluates on the built-in phantom; pictures and NIfTI maps are in $(DEMO).
demo: $(BIN)/.installed
	rm -rf $(DEMO)
	$(BIN)/python preprocess.py --phantom phantom-mini --root $(DEMO)/raw --out $(DEMO)/prepared
	$(BIN)/accelerate launch --num_processes 1 train.py --config configs/andi_phantom.yaml --data $(DEMO)/prepared --train.output_dir $(DEMO)/andi
	$(BIN)/accelerate launch --num_processes 1 train.py --config configs/anoddpm_phantom.yaml --data $(DEMO)/prepared --train.output_dir $(DEMO)/anoddpm
	$(BIN)/accelerate launch --num_processes 1 eval.py --model $(DEMO)/andi/pipeline --model $(DEMO)/anoddpm/pipeline --data $(DEMO)/prepared --output_dir $(DEMO)/eval --set_threshold validation
	$(BIN)/python predict.py --model $(DEMO)/andi/pipeline $(DEMO)/raw/tumour_0028 $(DEMO)/raw/stroke_0031 --brain brain.nii.gz -o $(DEMO)/maps
	@cat $(DEMO)/eval/report.md
	@echo "Pictures: $(DEMO)/eval/cases.png, $(DEMO)/maps/*/overview.png; NIfTI maps: $(DEMO)/maps/*/anomaly_map.nii.gz"

test: $(BIN)/.installed
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

quality: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The root is the package, so the type checker needs to see it under its name.
types: $(BIN)/.installed
	mkdir -p .types && ln -sfn .. .types/anodiff
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmark]"
	$(BIN)/python benchmarks/draws.py
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/prepared.py
	$(BIN)/python benchmarks/andi.py
	$(BIN)/python benchmarks/cimd.py
	$(BIN)/python benchmarks/anofpdm.py
	$(BIN)/python benchmarks/cddpm.py

# A Hub on this machine to try push and pull with; docs/hub.md.
hub: $(BIN)/.installed
	$(BIN)/python tests/hub_server.py --port 8765

# Pushes the checkpoints that come with the package: make publish OWNER=name; docs/hub.md.
publish: $(BIN)/.installed
	$(BIN)/python publish.py --owner "$(OWNER)" $(ARGS)

clean:
	rm -rf $(VENV) .types outputs
