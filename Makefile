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

PICK_VMM = vmm='$(VMM)'; \
	if [ -z "$$vmm" ]; then \
	  if command -v cloud-hypervisor >/dev/null && $(BIN)/havekvm 2>/dev/null; \
	  then vmm=$$(command -v cloud-hypervisor); else vmm=$(BIN)/standin; fi; fi

# Brokers, guests and mount namespaces need root.
ROOT := $(CURDIR)/test/setup/root

# Flags of every binary that boots guests.
GUEST_FLAGS = -vmm "$$vmm" -virtiofsd $(CACHE)/crates/bin/virtiofsd \
	-kernel $(CACHE)/kernel/vmlinux -initramfs $(CACHE)/guest/initramfs.img
BROKER_FLAGS = -shim $(BIN)/spectrum-shim -broker $(BIN)/spectrum-broker -cap $(BIN)/spectrum-cap

# Packages whose tests need no guest.
UNIT = $$(go list ./... | grep -vE '/test/(e2e|contract|bench|demo)$$')

.NOTPARALLEL:
.PHONY: help demo test setup build check generate vuln unit contract e2e bench fuzz docs clean

help: ## show this list
	@sed -nE 's/^([a-z0-9]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r t d; do printf '  make %-10s %s\n' "$$t" "$$d"; done

demo: setup ## see a grant and its end on real guests (KEEP=1 leaves it running)
	@$(PICK_VMM); exec $(ROOT) $(BIN)/demo $(if $(filter-out 0,$(KEEP)),-keep) $(GUEST_FLAGS) $(BROKER_FLAGS)

test: setup check unit contract e2e ## everything: check, unit tests with -race, contract and e2e on real guests

setup: ## install and build what the other targets need, into the user's cache
	@test/setup/setup

build: ## build the four programs into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

unit: ## go test -race for all that needs no guest (RUN=pattern)
	@timeout -k 30 25m $(BIN)/skips -- go test -json -race -timeout 12m $(if $(filter-out 0,$(shell id -u)),-exec $(ROOT)) $(if $(RUN),-run '$(RUN)') $(UNIT)

# $(call guests,NAME,FLAGS,TIMEOUT) builds test/NAME into one relocatable
# binary and runs it away from its sources.
guests = CGO_ENABLED=0 go test -c -trimpath -o $(BIN)/$(1).test ./test/$(1); \
	$(PICK_VMM); echo "$(1): on $$vmm"; allow=$$PWD/test/allowed-skips.txt; cd $(BIN); \
	timeout -k 30 $(3)m $(BIN)/skips -v -allow "$$allow" -- go tool test2json -t -p spectrum-os.org/broker/test/$(1) \
	  $(ROOT) $(BIN)/$(1).test -test.v=test2json -test.timeout $(3)m $(if $(RUN),-test.run '$(RUN)') \
	  $(GUEST_FLAGS) $(2) -stretch $(STRETCH)

contract: setup ## hold the VMM client against the VMM (VMM=path, RUN=pattern)
	@$(call guests,contract,,12)

e2e: setup ## the end-to-end suite on real guests (VMM=path, STRETCH=n, RUN=pattern)
	@$(call guests,e2e,$(BROKER_FLAGS) -demo $(BIN)/demo,30)

bench: setup ## print speed as ratios against probes in the same run, and write bench.json
	@CGO_ENABLED=0 go build -trimpath -o $(BIN)/bench ./test/bench; \
	CGO_ENABLED=0 go test -c -trimpath -o $(BIN)/policy.test ./policy; $(PICK_VMM); \
	exec timeout -k 30 30m $(ROOT) $(BIN)/bench $(GUEST_FLAGS) $(BROKER_FLAGS) -policy-test $(BIN)/policy.test -json bench.json

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
