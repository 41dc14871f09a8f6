package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"spectrum-os.org/broker/broker"
	"spectrum-os.org/broker/vmm/shim"
)

// The exit codes. They are part of the interface: they are added to, never
// changed.
const (
	exitFailed = 1
	exitUsage  = 2
)

const exitCodeText = `Exit codes:
    0  ended by SIGINT or SIGTERM
    1  failed: it could not start, or not go on
    2  the command makes no sense`

// usageError is the caller's mistake in how the command is written.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

func exitCode(err error) int {
	var bad *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &bad):
		return exitUsage
	}
	return exitFailed
}

// flags are those whose values are read once all are known.
type flags struct {
	builtin, partitions, hostPolicy string
	mode, level                     string
}

// The bounds of what flags take. A VM with more PCI segments than the shim
// allows would not start.
const (
	maxSegments = 8
	maxCount    = 1_000_000
	// What is in force is carried over at each rotation.
	leastRotation = 1000
	maxWait       = 24 * time.Hour
	maxStretch    = 1000
)

func register(f *pflag.FlagSet, o *broker.Options, v *flags) {
	f.StringVar(&o.StateDir, "state", "/var/lib/spectrum-broker", "directory of the ledger and the signing key")
	f.StringVar(&o.RuntimeDir, "runtime", "/run/spectrum-broker", "directory of sockets and running VMs; must not outlive a boot")
	f.StringVar(&v.builtin, "builtin", "", "directory of built-in VM definitions")
	f.StringVar(&v.partitions, "partitions", "/run/spectrum/partitions", "directory with one directory for each user partition, named by its UUID")
	f.StringVar(&v.hostPolicy, "host-policy", "/etc/spectrum-broker/policy", "directory of the host's Rego files")
	f.StringVar(&o.Socket, "socket", "", "socket of the host API (default RUNTIME/host.sock)")
	f.StringVar(&v.mode, "socket-mode", "0600", "mode of the host socket, octal")
	f.StringVar(&o.SocketGroup, "socket-group", "", "group of the host socket, name or number")
	f.StringVar(&o.VMM, "vmm", "cloud-hypervisor", "virtual machine monitor, a path or a name on PATH")
	f.StringVar(&o.Virtiofsd, "virtiofsd", "virtiofsd", "virtio-fs daemon, a path or a name on PATH")
	f.StringVar(&o.Shim, "shim", "spectrum-shim", "the shim, a path or a name on PATH or beside this program")
	f.DurationVar(&o.CutDeadline, "cut-deadline", shim.DefaultCutDeadline, "how long a guest may take to let go before it is cut off")
	f.DurationVar(&o.StopGrace, "stop-grace", 10*time.Second, "how long a guest may take to power off")
	f.DurationVar(&o.BootGrace, "boot-grace", 30*time.Second, "how long after its start a VM's agent may be silent")
	f.IntVar(&o.Segments, "pci-segments", shim.DefaultSegments, fmt.Sprintf("PCI segments of each VM, at most %d; each holds 29 grants", maxSegments))
	f.IntVar(&o.MaxGrants, "max-grants", 256, "live grants that one VM may hold")
	f.IntVar(&o.GuestRequests, "guest-requests", 12, "requests a minute that one VM may make for as long as it likes")
	f.IntVar(&o.GuestBurst, "guest-burst", 120, "requests that one VM may make at once")
	f.IntVar(&o.RotateAuditAt, "rotate-audit-at", 0, "put the audit's events into an archive when there are so many; 0: only when somebody asks for it")
	f.Float64Var(&o.Stretch, "stretch", 1, "factor on every timeout that waits for a guest or a worker, for slow machines")
	f.StringVar(&v.level, "log-level", "info", "debug, info, warn or error")
}

// check refuses what no broker could run with, and reads the rest into o.
func (v *flags) check(o *broker.Options) (slog.Level, error) {
	var level slog.Level
	for _, s := range []struct{ name, value string }{
		{"state", o.StateDir},
		{"runtime", o.RuntimeDir},
		{"host-policy", v.hostPolicy},
		{"vmm", o.VMM},
		{"virtiofsd", o.Virtiofsd},
		{"shim", o.Shim},
	} {
		if s.value == "" {
			return level, usage("--%s is empty", s.name)
		}
	}
	for _, n := range []struct {
		name        string
		value, most int
	}{
		{"pci-segments", o.Segments, maxSegments},
		{"max-grants", o.MaxGrants, maxCount},
		{"guest-requests", o.GuestRequests, maxCount},
		{"guest-burst", o.GuestBurst, maxCount},
	} {
		if n.value < 1 || n.value > n.most {
			return level, usage("--%s %d is not between 1 and %d", n.name, n.value, n.most)
		}
	}
	if n := o.RotateAuditAt; n != 0 && (n < leastRotation || n > maxCount*1000) {
		return level, usage("--rotate-audit-at %d is neither 0 nor between %d and %d", n, leastRotation, maxCount*1000)
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"cut-deadline", o.CutDeadline}, {"stop-grace", o.StopGrace}, {"boot-grace", o.BootGrace}} {
		if d.value < time.Millisecond || d.value > maxWait {
			return level, usage("--%s %v is not between 1ms and 24h", d.name, d.value)
		}
	}
	if math.IsNaN(o.Stretch) || o.Stretch < 1 || o.Stretch > maxStretch {
		return level, usage("--stretch %v is not between 1 and %d", o.Stretch, maxStretch)
	}
	bits, err := strconv.ParseUint(v.mode, 8, 32)
	if err != nil || bits > 0o777 {
		return level, usage("--socket-mode %q is not an octal mode between 0 and 0777, such as 0660", v.mode)
	}
	if bits == 0 {
		return level, usage("--socket-mode %q lets nobody in", v.mode)
	}
	o.SocketMode = fs.FileMode(bits)
	switch strings.ToLower(v.level) {
	case "debug", "info", "warn", "error":
	default:
		return level, usage("--log-level %q is none of debug, info, warn and error", v.level)
	}
	return level, level.UnmarshalText([]byte(v.level))
}
