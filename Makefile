# Cornucopia. `make` lists what can be made; every target sets up what it needs by itself.
PYTHON ?= python3
options ?=

BIN := .venv/bin
READY := .venv/.ready
TASKS := $(subst /,.,$(patsubst apps/%.py,%,$(filter-out %/__init__.py,$(wildcard apps/*/*.py))))
DOMAINS := $(sort $(foreach task,$(TASKS),$(firstword $(subst ., ,$(task)))))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PACKAGES := --editable '.[vision,speech,nlp,recommendation,rl,generative,tune,dev]'
SUITE := generative.write nlp.classify speech.spot vision.classify recommendation.retrieve rl.ppo  # long ones first

.PHONY: help install suite test list serve quality report lint clean $(TASKS) $(DOMAINS)

help:
	@echo 'make suite        set up, then every domain'"'"'s first task on embedded data, to a served answer'
	@echo 'make test         set up, then the tests'
	@echo 'make TASK         raw data to a served answer: $(TASKS)'
	@echo 'make DOMAIN       every task of a domain: $(DOMAINS)'
	@echo '                  flags as options="--data=fashion-mnist --epochs=12"; options=--help lists them'
	@echo 'make serve        serve saved_models/ over gRPC and REST: tensorflow_model_server if it is there, else ours'
	@echo 'make list         the tasks, one line each'
	@echo 'make quality      train on the real data and compare with what the tasks promise (long)'
	@echo 'make report       write the README'"'"'s table from the results of make quality'
	@echo 'make lint         ruff'
	@echo 'make install      the environment alone, in .venv'
	@echo 'make clean        remove the environment and caches; runs/ and saved_models/ stay'

install: $(READY)

# By uv, in a fraction of the time; by pip where uv fails, or pip's settings name an index, which uv does not read.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and \
		f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	! $(BIN)/python -m pip config list | grep '\.index-url' >/dev/null && $(PIP) uv && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
			--constraint constraints.txt $(PACKAGES) || $(PIP) $(PACKAGES)
	@touch $@

suite: $(READY)
	@$(BIN)/python -m benchmarks.suite $(SUITE)

test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(options)

list: $(READY)
	@$(BIN)/cornucopia list

$(TASKS): $(READY)
	@$(BIN)/cornucopia train $@ $(options)

define domain
$(1): $(READY)
	@for task in $(filter $(1).%,$(TASKS)); do $(BIN)/cornucopia train $$$$task $$(options) || exit 1; done
endef
$(foreach name,$(DOMAINS),$(eval $(call domain,$(name))))

# TensorFlow Serving itself where it is installed, else ours: the same models, protocols and ports.
serve: $(READY)
	@if command -v tensorflow_model_server >/dev/null; then \
		echo "starting tensorflow_model_server, found at $$(command -v tensorflow_model_server)"; \
		exec tensorflow_model_server --port=8500 --rest_api_port=8501 \
			--model_config_file=saved_models/models.config $(options); \
	else \
		echo "starting cornucopia serve; tensorflow_model_server is not on the PATH"; \
		exec $(BIN)/cornucopia serve --port=8500 --rest_api_port=8501 $(options); \
	fi

quality: $(READY)
	@$(BIN)/python -m benchmarks.quality $(options)

report: $(READY)
	@$(BIN)/python -m benchmarks.report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find apps shared tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
