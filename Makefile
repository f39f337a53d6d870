# make search   the demo search          make check   lint, types, tests
# make test     the tests                make install only the environment
# make bench    all benches, CPU sizes   make test-slurm   searches on a local Slurm cluster; root, Debian
#                                        make test-faults  100 kills and 20 drains
#                                        make browser  Chromium, for the test of the report; root, Debian
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: search test test-faults test-slurm browser check lint install bench
search: install
	$(BIN)/python cli.py search

test: install
	$(BIN)/python -m pytest -n 2 tests --ignore=tests/slurm

# The tests start munge, slurmctld and two slurmd on loopback. RUNLEVEL=1 keeps the installation from starting services.
test-slurm: install
	@which munged slurmctld slurmd srun > /dev/null || { [ "$$(id -u)" = 0 ] && which apt-get > /dev/null \
	&& apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	apt-get install -y -qq --no-install-recommends munge slurm-wlm > /dev/null; } \
	|| echo "munge and slurm-wlm are missing and cannot be installed: the tests will be skipped"
	$(BIN)/python -m pytest tests/slurm

# 100 kills of workers and drivers, and 20 drains, each in a search that must still reach the same result.
test-faults: install
	FAULTS_RUNS=50 DRAIN_RUNS=20 $(BIN)/python -m pytest -n 2 tests/test_faults.py tests/test_drain.py -k "any_moment or same_command"

# With Chromium, `make test` opens the report; without it that test is skipped.
browser:
	@which chromium > /dev/null || { [ "$$(id -u)" = 0 ] && which apt-get > /dev/null && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; } \
	|| echo "Chromium is missing and cannot be installed: the report is not tested in a browser"

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# All benches at CPU sizes. Each measures a ratio against a peer in the same run.
bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q bench/bench_*.py --benchmark-only
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/bench_surrogate.py
	$(BIN)/python -m bench.bench_fleet overhead --workers 4 --trials 400

# The stamp is newer than the files it depends on, so a second call installs nothing.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cli,export,optuna,report,tensorboard,pretrained,test]'
	touch $@

# ---- kernels -------------------------------------------------------------
# make bench-kernels   the losses against their peers, CPU sizes, table and plots in OUT
# make aot             compile every kernel variant for sm_80, sm_90, sm_100 and sm_120, without a GPU
# make gpu-bundle      real images and DALI in build/gpu-bundle, small enough to copy to a machine with a GPU
# make gpu-check       everything that only a GPU can show, within 500 s, one JSON in OUT; on the GPU machine, use
#                      PYTHON=python3, and DALI=build/gpu-bundle for the parts that need it
# make gpu-image       the fake-device and reference tests with the oldest supported torch and triton, those of common
#                      GPU images, in a separate environment (5 GB)
OUT     ?= build/bench
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

IMAGE    = build/gpu-image
OLDEST   = 'torch==2.11.*' 'torchvision==0.26.*' 'triton==3.6.*' numpy pillow safetensors pyyaml psutil pytest hypothesis

.PHONY: bench-kernels aot gpu-bundle gpu-check gpu-image
bench-kernels: install
	mkdir -p $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench/bench_kernels.py -q --benchmark-only --benchmark-json=$(OUT)/raw.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_kernels $(OUT)/raw.json $(OUT)

aot: install
	$(BIN)/python -m kernels.aot --report

$(IMAGE)/.installed:
	$(PYTHON) -m venv $(IMAGE)
	$(IMAGE)/bin/python -m pip install --quiet $(OLDEST)
	touch $@

gpu-image: $(IMAGE)/.installed
	$(IMAGE)/bin/python -m pytest -q tests/test_fake_cuda.py tests/test_kernels_reference.py

gpu-check:
	$(GPU_PYTHON) bench/gpu_check.py $(OUT) $(if $(DALI),--bundle $(DALI))

gpu-bundle: build/cifar10_small.npz | install
	$(BIN)/python -m bench.gpu_bundle build/gpu-bundle --images $<

build/cifar10_small.npz: | install
	mkdir -p build
	$(BIN)/python $(SHARED)/unpack.py $(SHARED)/cifar10_small.npz $@

# ---- results -------------------------------------------------------------
# make results         the pages of docs/results that are made from raw results kept there, in seconds
# make evidence        fidelity studies on two CPU cores, in order, resumable; WORKERS=2
# make why             the first study again with other temperatures, weights, epochs, and another teacher
# make baselines       the search against its baselines on real trainings, resumable
# make authors         the measurements of the paper's authors, read as such a study (seconds); TABLE=FILE
# make real-size       NAS-Bench-201 at its own size against the benchmark's accuracies (hours, resumable)
# make learned-weights the surrogate's trends in NAS-Bench-201's windows of equal MACs (minutes)
# make trends          replays with training-free scores, useless ones among them, on three tables (an hour and a half, resumable)
# make front           caps on latencies and whole fronts, replayed on NAS-Bench-201 (half an hour, resumable)
# make gpu-evidence    the paper's own setting, on a GPU, within MINUTES, on IMAGES (build/cifar10_small.npz is small
#                      enough to copy to a GPU machine with the checkout)
WORKERS  ?= 2
EVIDENCE  = build/evidence
SHARED    = $(firstword $(wildcard shared/data ../shared/data))
TABLE    ?= $(SHARED)/mfkd_mobilenetv2_cifar100.csv.gz
STUDIES   = glyphs-nasbench201-cap cifar100-nasbench201 glyphs-nasbench201 cifar100-nasbench201-cap \
            glyphs-mobilenetv2 cifar100-mobilenetv2 glyphs-mobilenetv2-cap cifar100-mobilenetv2-cap
BASELINES = baselines-glyphs baselines-cifar100 baselines-glyphs-weak baselines-cifar100-weak \
            baselines-glyphs-again baselines-cifar100-again
WHY       = why-settings why-teacher cifar100-nasbench201-kd
TEACHER   = $(BIN)/python cli.py teacher --batch-size 64 --space

authors: | install
	$(BIN)/python -m bench.evidence.recorded $(TABLE)

results: | install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.evidence.low_fidelities
	$(BIN)/python -m bench.evidence.baselines
	$(BIN)/python -m bench.kernel_page
	$(BIN)/python -m bench.pretrained.conclude docs/results/pretrained

.PHONY: results authors evidence why baselines $(BASELINES) gpu-evidence $(STUDIES) $(WHY)
evidence: $(STUDIES)
why: $(WHY)

$(filter glyphs-nas%,$(STUDIES)): $(EVIDENCE)/teachers/glyphs.safetensors
$(filter glyphs-mob%,$(STUDIES)): $(EVIDENCE)/teachers/glyphs-32.safetensors
$(filter cifar100-%,$(STUDIES)): $(EVIDENCE)/teachers/cifar100.safetensors
why-settings: glyphs-nasbench201-cap
cifar100-nasbench201-kd: build/cifar100.npz
why-teacher: glyphs-nasbench201-cap $(EVIDENCE)/teachers/glyphs-weak.safetensors
$(STUDIES) $(WHY): | install
	$(BIN)/python cli.py fidelity-study -c bench/evidence/$@.yaml --workers $(WORKERS) --run-dir $(EVIDENCE)/$@
	$(BIN)/python -m bench.evidence.keep $(EVIDENCE)/$@

baselines: $(BASELINES)
baselines-cifar100 baselines-cifar100-again: build/cifar100.npz
baselines-glyphs-weak: baselines-glyphs $(EVIDENCE)/teachers/glyphs-weak.safetensors
baselines-cifar100-weak: baselines-cifar100 $(EVIDENCE)/teachers/cifar100-weak.safetensors
$(BASELINES): | install
	$(BIN)/python cli.py fidelity-study -c bench/evidence/$@.yaml --workers $(WORKERS) --run-dir $(EVIDENCE)/$@
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.evidence.baselines $(EVIDENCE)/$@

$(EVIDENCE)/teachers/glyphs.safetensors: | install
	$(TEACHER) nasbench201:channels=16,cells=1 --resolution 16 --data glyphs --teacher-epochs 12 --out $@

$(EVIDENCE)/teachers/glyphs-weak.safetensors: | install
	$(TEACHER) nasbench201:channels=8,cells=1 --resolution 16 --data glyphs --teacher-epochs 4 --out $@

$(EVIDENCE)/teachers/glyphs-32.safetensors: | install
	$(TEACHER) nasbench201:channels=8,cells=1 --resolution 32 --data glyphs --teacher-epochs 4 --out $@

$(EVIDENCE)/teachers/cifar100-weak.safetensors: build/cifar100.npz | install
	$(TEACHER) nasbench201:channels=8,cells=1 --resolution 16 --data build/cifar100.npz --teacher-epochs 2 --out $@

$(EVIDENCE)/teachers/cifar100.safetensors: build/cifar100.npz | install
	$(TEACHER) nasbench201:channels=16,cells=1 --resolution 16 --data build/cifar100.npz --teacher-epochs 6 --out $@

# On the GPU machine, use PYTHON=python3. It ends within MINUTES; run the same command again to resume.
MINUTES ?= 8
IMAGES  ?= build/cifar10_small.npz
gpu-evidence:
	@test -f $(IMAGES) || { echo "no $(IMAGES): make it on a machine with the shared data, and copy it here"; exit 2; }
	$(GPU_PYTHON) -m bench.evidence.gpu $(EVIDENCE)/gpu --minutes $(MINUTES) --data $(IMAGES)

.PHONY: real-size learned-weights trends front
# Starts from the trainings kept in docs/results, and goes on.
real-size: | install
	mkdir -p build/real-size
	test -f build/real-size/trainings.jsonl || cp docs/results/real-size-trainings.jsonl build/real-size/trainings.jsonl
	seq 0 $$(($(WORKERS) - 1)) | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -I{} nice -n 19 \
	$(BIN)/python -m bench.real_size.study build/real-size --shared $(SHARED) --part {}/$(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.real_size.untrained build/real-size --shared $(SHARED)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.real_size.conclude build/real-size --shared $(SHARED)

learned-weights: | install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.learned_weights $(SHARED)

trends: | install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.trends $(SHARED)

front: | install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.front $(SHARED)

build/cifar100.npz: | install
	mkdir -p build
	$(call cifar100,$(BIN)/python,$@)

# From a folder shared/data in or beside the checkout; without one, `--data cifar100` downloads it.
cifar100 = $(if $(SHARED),$(1) $(SHARED)/unpack.py $(SHARED)/cifar100.npz $(2),$(1) -c "import numpy, pathlib; \
from engine.data.arrays import cifar; numpy.savez('$(2)', **cifar('cifar100', pathlib.Path('build')))")
