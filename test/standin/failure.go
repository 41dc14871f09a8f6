package main

import (
	"errors"
	"net/http"
)

// failure is an error answer: Cloud Hypervisor writes the chain of causes as a
// JSON array, outermost first. Inner layers make a failure with their own
// words; the route puts "Error from API" and what the call could not do in
// front.
type failure struct {
	status int
	chain  []string
}

func (f *failure) Error() string {
	text := ""
	for i, m := range f.chain {
		if i > 0 {
			text += ": "
		}
		text += m
	}
	return text
}

func fail(status int, chain ...string) error { return &failure{status, chain} }

// internal is a failure that has no status of its own.
func internal(chain ...string) error { return fail(http.StatusInternalServerError, chain...) }

// within puts causes in front of an error's chain and keeps its status.
func within(err error, outer ...string) error {
	if err == nil {
		return nil
	}
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{http.StatusInternalServerError, []string{err.Error()}}
	}
	return &failure{f.status, append(append([]string{}, outer...), f.chain...)}
}

// The causes that more than one call gives.
var (
	errNotCreated = fail(http.StatusNotFound, "VM is not created")
	errNoConfig   = fail(http.StatusNotFound, "VM config is missing")
	errCreated    = internal("VM is already created")
	errNotRunning = internal("VM is not running")
)

func errUnknownDevice(id string) error {
	return fail(http.StatusNotFound, "Error from device manager",
		"Failed to find device corresponding to the given identifier: "+id)
}

func errNotUnique(id string) error {
	return fail(http.StatusConflict, "Failed to validate config", "Identifier "+id+" is not unique")
}

func errInvalid(what string) error {
	return fail(http.StatusBadRequest, "Failed to validate config", what)
}

func errNoSlot() error {
	return internal("Error from device manager", "Failed to find an available PCI device ID",
		"Could not find an available device slot on the PCI bus")
}
