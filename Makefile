# `make demo` and `make test` each work on a fresh machine as the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= outputs/demo
# What the demonstration makes: heads to learn from, heads of the validation and of the test, steps of the fine-tuning.
DEMO_SUBJECTS ?= 3
DEMO_TESTED ?= 3
DEMO_HALF ?= 50
DEMO_STEPS ?= 100

.PHONY: demo picture test quality style types benchmark hub publish clean

# The virtual environment, made anew whenever a pinned version changes.
$(BIN)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# From raw scans to maps in five minutes: results are in $(DEMO), which is made anew. Every command is one that a user types.
RUN := $(BIN)/anodiff
HEADS := $(RUN) preprocess --heads builtin --subjects $(DEMO_SUBJECTS) --tested $(DEMO_TESTED)
# The first head of the test with a lesion.
TUMOUR := tumour_$(shell printf %05d $$(($(DEMO_SUBJECTS) + $(DEMO_TESTED) + 1)))
FINETUNE := $(RUN) train --config finetune_heads.yaml --data $(DEMO)/prepared/flair --train.output_dir $(DEMO)/finetuned --train.batch_size 2 --train.report_to none
# One draw instead of four, and no thresholds of a validation, for the time.
EVAL := $(RUN) eval --inference.num_draws 1 --validation_split none
demo: $(BIN)/.installed
	rm -rf $(DEMO)
	@echo "1. Heads that nobody was scanned for: FLAIR, T1, and T2 with its skull. Scans: $(DEMO)/scans"
	$(HEADS) --contrast flair --root $(DEMO)/scans/flair --out $(DEMO)/prepared/flair
	$(HEADS) --contrast t1 --root $(DEMO)/scans/t1 --out $(DEMO)/prepared/t1
	$(HEADS) --contrast t2 --skull true --root $(DEMO)/scans/t2 --out $(DEMO)/prepared/t2
	@echo "2. Checkpoints that come with the library find what is wrong with them. Look at: $(DEMO)/maps/*/report.html"
	$(RUN) predict $(DEMO)/scans/flair/$(TUMOUR)/flair.nii.gz -o $(DEMO)/maps/flair
	$(RUN) predict $(DEMO)/scans/t1/$(TUMOUR)/t1.nii.gz -o $(DEMO)/maps/t1
	$(RUN) predict $(DEMO)/scans/t2/$(TUMOUR)/t2.nii.gz -o $(DEMO)/maps/t2
	@echo "3. Fine-tuning on the healthy heads, stopped half-way, and gone on with as if nothing had happened. Look at: $(DEMO)/finetuned/samples"
	$(FINETUNE) --train.max_steps $(DEMO_HALF)
	$(FINETUNE) --train.max_steps $(DEMO_STEPS) --train.resume latest
	@echo "4. How well lesions are found, beside the plain intensity. Look at: $(DEMO)/eval/*/report.html"
	$(EVAL) --data $(DEMO)/prepared/flair --output_dir $(DEMO)/eval/flair --model anoddpm-flair --model $(DEMO)/finetuned/pipeline
	$(EVAL) --data $(DEMO)/prepared/t1 --output_dir $(DEMO)/eval/t1 --model anoddpm-t1
	$(EVAL) --data $(DEMO)/prepared/t2 --output_dir $(DEMO)/eval/t2 --model anoddpm-t2
	@for report in $(DEMO)/eval/*/report.md; do awk '/^# /; /^\|/ {table = 1; print} table && !/^\|/ {exit}' $$report; done

# The picture of the README: the demonstration's T2, in few colours.
picture:
	$(BIN)/python -c "from PIL import Image; picture = Image.open('$(DEMO)/maps/t2/t2/overview.png').convert('RGB'); \
	picture.thumbnail((1000, 1000)); picture.quantize(256, method=1, dither=0).save('docs/images/overview.png', optimize=True)"

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
	$(BIN)/python benchmarks/median.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/prepared.py
	$(BIN)/python benchmarks/andi.py
	$(BIN)/python benchmarks/cimd.py
	$(BIN)/python benchmarks/anofpdm.py
	$(BIN)/python benchmarks/cddpm.py

# A Hub on this machine to try push and pull with; docs/hub.md.
hub: $(BIN)/.installed
	$(BIN)/python tests/hub_server.py --port 8765

# Pushes the checkpoints that come with the package, and the Space that shows them: make publish OWNER=name; docs/hub.md.
publish: $(BIN)/.installed
	$(BIN)/python publish.py --owner "$(OWNER)" $(ARGS)
	$(BIN)/python publish.py --owner "$(OWNER)" --space

clean:
	rm -rf $(VENV) .types outputs
