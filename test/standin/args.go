package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// version is what the stand-in claims to be, so that a caller that checks for
// a minimum passes; build_version tells it apart.
const (
	version      = "53.0.0"
	buildVersion = "v53.0-standin"
)

// endpoint names a file or socket by its path or by an inherited descriptor.
type endpoint struct {
	path string
	fd   int // -1: none
}

func (e endpoint) given() bool { return e.path != "" || e.fd >= 0 }

// options is the part of Cloud Hypervisor's command line that matters to a
// caller that configures the VM over the API.
type options struct {
	api        endpoint
	events     endpoint
	logFile    string
	verbosity  int
	showHelp   bool
	showVer    bool
	noShutdown bool
}

// valued lists the options that take a value and change nothing here: the
// stand-in has no seccomp filters or Landlock rules of its own.
var valued = map[string]bool{
	"--seccomp": true, "--log-format": true, "--landlock-rules": true,
}

// parseArgs reads the command line. An option that would configure a VM is
// refused, since ignoring it would boot something else than was asked for.
func parseArgs(args []string) (options, error) {
	o := options{api: endpoint{fd: -1}, events: endpoint{fd: -1}}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		name, value, inline := strings.Cut(arg, "=")
		if !strings.HasPrefix(name, "--") {
			name, value, inline = arg, "", false
		}
		take := func() (string, error) {
			if inline {
				return value, nil
			}
			if len(args) == 0 {
				return "", fmt.Errorf("a value is required for '%s'", name)
			}
			v := args[0]
			args = args[1:]
			return v, nil
		}
		var err error
		switch {
		case name == "--api-socket":
			err = into(take, func(v string) (e error) {
				o.api, e = parseEndpoint(v, true)
				return e
			})
		case name == "--event-monitor":
			err = into(take, func(v string) (e error) {
				o.events, e = parseEndpoint(v, false)
				return e
			})
		case name == "--log-file":
			o.logFile, err = take()
		case valued[name]:
			_, err = take()
		case name == "--landlock":
		case name == "--no-shutdown":
			o.noShutdown = true
		case name == "-V", name == "--version":
			o.showVer = true
		case name == "-h", name == "--help":
			o.showHelp = true
		case strings.HasPrefix(arg, "-v") && strings.Trim(arg[1:], "v") == "":
			o.verbosity += len(arg) - 1
		default:
			err = fmt.Errorf("unexpected argument '%s'", arg)
		}
		if err != nil {
			return o, err
		}
	}
	if !o.showVer && !o.showHelp && !o.api.given() {
		return o, errors.New("--api-socket is required")
	}
	return o, nil
}

func into(take func() (string, error), set func(string) error) error {
	v, err := take()
	if err != nil {
		return err
	}
	return set(v)
}

// parseEndpoint reads "path=P" or "fd=N". Cloud Hypervisor takes a bare path
// for the API socket too.
func parseEndpoint(v string, bare bool) (endpoint, error) {
	key, value, ok := strings.Cut(v, "=")
	switch {
	case ok && key == "path" && value != "":
		return endpoint{path: value, fd: -1}, nil
	case ok && key == "fd":
		fd, err := strconv.Atoi(value)
		if err != nil || fd < 0 {
			return endpoint{fd: -1}, fmt.Errorf("invalid descriptor '%s'", value)
		}
		return endpoint{fd: fd}, nil
	case bare && !ok && v != "":
		return endpoint{path: v, fd: -1}, nil
	}
	return endpoint{fd: -1}, fmt.Errorf("path or fd required in '%s'", v)
}

const usage = `Speaks Cloud Hypervisor's API and drives QEMU's software emulation.

Usage: standin --api-socket path=PATH|fd=N [--event-monitor path=PATH|fd=N]
               [--log-file FILE] [-v] [--seccomp MODE] [--no-shutdown] [--version]

Environment:
  SPECTRUM_QEMU                 qemu-system-x86_64 to run
  SPECTRUM_VHOST_DEVICE_VSOCK   vhost-device-vsock to run
`
