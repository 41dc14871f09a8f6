# make demo and make test are all that a newcomer needs: each does the set-up.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/spectrum-broker
BIN   := $(CACHE)/bin
TOOLS := $(CACHE)/tools
export PATH := $(CACHE)/crates/bin:$(PATH)

# The VMM under test; empty picks cloud-hypervisor where that can work, else
# the stand-in. STRETCH multiplies every timeout of the guest suites.
VMM     ?=
STRETCH ?= 2
RUN     ?=
KEEP    ?=
FUZZTIME ?= 20s
# How often make disks cuts the power.
CUTS    ?= 30

PICK_VMM = vmm='$(VMM)'; \
	if [ -z "$$vmm" ]; then \
	  if command -v cloud-hypervisor >/dev/null && $(BIN)/havekvm 2>/dev/null; \
	  then vmm=$$(command -v cloud-hypervisor); else vmm=$(BIN)/standin; fi; fi

# Brokers, guests and mount namespaces need root.
ROOT := $(CURDIR)/test/setup/root

# Flags of every binary that boots guests.
GUEST_FLAGS = -vmm "$$vmm" -virtiofsd $(CACHE)/crates/bin/virtiofsd \
	-kernel $(CACHE)/kernel/vmlinux -initramfs $(CACHE)/guest/initramfs.img
# make soak kills the broker so often, with choices of this seed (0: the
# clock's), from this desktop on.
KILLS ?= 10000
SEED  ?= 0
PART  ?= 0
GUEST_KILLS ?= 30

# The broker and the shim with failpoints in them, for those who kill them.
ARMED = CGO_ENABLED=0 go build -trimpath -tags failpoints -o $(BIN)/armed/ ./cmd/spectrum-broker ./cmd/spectrum-shim
ARMED_FLAGS = -armed-broker $(BIN)/armed/spectrum-broker -armed-shim $(BIN)/armed/spectrum-shim
BROKER_FLAGS = -shim $(BIN)/spectrum-shim -broker $(BIN)/spectrum-broker -cap $(BIN)/spectrum-cap

# Packages whose tests need no guest.
UNIT = $$(go list ./... | grep -vE '/test/(e2e|contract|bench|demo|kill|disks)$$')

.NOTPARALLEL:
.PHONY: help demo test setup build check generate vuln unit contract kills disks e2e soak bench plots fuzz docs clean

help: ## show this list
	@sed -nE 's/^([a-z0-9]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r t d; do printf '  make %-10s %s\n' "$$t" "$$d"; done

demo: setup ## see a grant and its end on real guests (KEEP=1 leaves it running)
	@$(PICK_VMM); exec $(ROOT) $(BIN)/demo $(if $(filter-out 0,$(KEEP)),-keep) $(GUEST_FLAGS) $(BROKER_FLAGS)

test: setup check unit contract kills disks e2e ## everything: check, unit tests with -race, contract, 200 kills, bad disks and power cuts, e2e on real guests

setup: ## install and build what the other targets need, into the user's cache
	@test/setup/setup

build: ## build the four programs into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

unit: ## go test -race for all that needs no guest (RUN=pattern)
	@timeout -k 30 25m $(BIN)/skips -- go test -json -race -timeout 12m $(if $(filter-out 0,$(shell id -u)),-exec $(ROOT)) $(if $(RUN),-run '$(RUN)') $(UNIT)

# $(call guests,NAME,FLAGS,TIMEOUT,PATTERN) builds test/NAME into one relocatable
# binary and runs it away from its sources: RUN's tests, or always PATTERN's.
guests = CGO_ENABLED=0 go test -c -trimpath -o $(BIN)/$(1).test ./test/$(1); \
	$(PICK_VMM); echo "$(1): on $$vmm"; allow=$$PWD/test/allowed-skips.txt; cd $(BIN); \
	timeout -k 30 $(3)m $(BIN)/skips -v -allow "$$allow" -- go tool test2json -t -p spectrum-os.org/broker/test/$(1) \
	  $(ROOT) $(BIN)/$(1).test -test.v=test2json -test.timeout $(3)m $(if $(or $(4),$(RUN)),-test.run '$(or $(4),$(RUN))') \
	  $(GUEST_FLAGS) $(2) -stretch $(STRETCH)

contract: setup ## hold the VMM client against the VMM (VMM=path, RUN=pattern)
	@$(call guests,contract,,12)

# $(call disks,FLAGS,TIMEOUT) cuts the broker's power and spoils its disk.
disks = $(ARMED); CGO_ENABLED=0 go test -c -trimpath -o $(BIN)/disks.test ./test/disks; \
	allow=$$PWD/test/allowed-skips.txt; cd $(BIN); \
	timeout -k 30 $(2)m $(BIN)/skips -v -allow "$$allow" -- go tool test2json -t -p spectrum-os.org/broker/test/disks \
	  $(ROOT) $(BIN)/disks.test -test.v=test2json -test.timeout $(2)m -seed $(SEED) -cuts $(CUTS) \
	  -broker $(BIN)/armed/spectrum-broker -shim $(BIN)/armed/spectrum-shim -virtiofsd $(CACHE)/crates/bin/virtiofsd \
	  -stretch $(STRETCH) $(1)

disks: setup ## cut the broker's power and spoil its disk (CUTS=n, SEED=s, RUN=pattern)
	@$(call disks,$(if $(RUN),-test.run '$(RUN)'),60)

e2e: setup ## the end-to-end suite on real guests (VMM=path, STRETCH=n, RUN=pattern)
	@$(ARMED); $(call guests,e2e,$(BROKER_FLAGS) $(ARMED_FLAGS) -demo $(BIN)/demo,30)

# $(call kills,FLAGS,TIMEOUT) kills the broker beneath a VMM without a guest.
kills = $(ARMED); CGO_ENABLED=0 go test -c -trimpath -o $(BIN)/kill.test ./test/kill; \
	source=$$PWD; cd $(BIN); timeout -k 30 $(2)m $(BIN)/skips -v -allow "$$source/test/allowed-skips.txt" -- go tool test2json -t -p spectrum-os.org/broker/test/kill \
	  $(ROOT) $(BIN)/kill.test -test.v=test2json -test.timeout $(2)m -source "$$source" \
	  -broker $(BIN)/armed/spectrum-broker -shim $(BIN)/armed/spectrum-shim -virtiofsd $(CACHE)/crates/bin/virtiofsd \
	  -stretch $(STRETCH) -seed $(SEED) -part $(PART) $(1)

# $(call minutes,KILLS,IN A MINUTE) is how long so many may take.
minutes = $(shell expr $(1) / $(2) + 30)

kills: setup ## kill the broker and shims 200 times and compare with what was acknowledged
	@$(call kills,-kills 200 -progress 30s,12)

soak: setup ## kill the broker KILLS=10000 times, and GUEST_KILLS=30 with real guests (SEED=n, PART=n: again)
	@$(call kills,-kills $(KILLS) -progress 30s,$(call minutes,$(KILLS),10))
	@[ $(GUEST_KILLS) = 0 ] || { $(ARMED); $(call guests,e2e,$(BROKER_FLAGS) $(ARMED_FLAGS) -kill-times $(GUEST_KILLS) -kill-seed $(SEED),$(call minutes,$(GUEST_KILLS),1),^TestKills$$); }
	@$(call disks,-test.run '^TestPowerCut$$' -cuts 2000,120)

bench: setup ## print speed as ratios against probes in the same run, and write bench.json
	@CGO_ENABLED=0 go build -trimpath -o $(BIN)/bench ./test/bench; \
	CGO_ENABLED=0 go test -c -trimpath -o $(BIN)/policy.test ./policy; $(PICK_VMM); \
	exec timeout -k 30 30m $(ROOT) $(BIN)/bench $(GUEST_FLAGS) $(BROKER_FLAGS) -policy-test $(BIN)/policy.test -json bench.json

plots: setup ## measure how it grows to 1,000,000 tokens, and draw it into docs/performance.md
	@CGO_ENABLED=0 go build -trimpath -o $(BIN)/bench ./test/bench; $(PICK_VMM); \
	exec timeout -k 30 60m $(ROOT) $(BIN)/bench $(GUEST_FLAGS) $(BROKER_FLAGS) -plots docs/performance -document docs/performance.md

check: ## formatting, linters, arrows between packages, generated files, both architectures
	@TOOLS=$(TOOLS) test/setup/check

generate: ## write every generated file anew
	go generate ./...

docs: generate ## the same: reference pages are generated

vuln: ## look for known vulnerabilities in what is linked in
	@TOOLS=$(TOOLS) test/setup/tools; test/setup/vuln $(TOOLS)/govulncheck

fuzz: ## run every fuzz target for a while (FUZZTIME=20s)
	@FUZZTIME=$(FUZZTIME) test/setup/fuzz

clean: ## remove bin/ and what the cache holds of this project's own
	rm -rf bin bench.json $(BIN) $(CACHE)/guest
