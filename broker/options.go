package broker

import (
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/sources"
)

// Options configure a [Broker]. Paths are host paths.
type Options struct {
	// StateDir holds the ledger and the signing key.
	StateDir string
	// RuntimeDir holds the host socket and a directory for each running VM. It
	// must not outlive a boot of the host.
	RuntimeDir string
	// Builtin holds the built-in VM definitions; empty for none.
	Builtin sources.HostPath
	// Partitions holds one directory for each user partition; empty for none.
	Partitions sources.HostPath
	// HostPolicy holds the host's Rego files.
	HostPolicy sources.HostPath
	// Socket is the host API's socket; default RuntimeDir/host.sock.
	Socket      string
	SocketMode  fs.FileMode // default 0600
	SocketGroup string      // empty: the broker's own

	// VMM, Virtiofsd and Shim are the programs to run.
	VMM, Virtiofsd, Shim string
	// PolicyWorker is the command line of a policy worker.
	PolicyWorker []string

	// CutDeadline is how long a guest may take to let go of a device that is
	// taken away before what serves it is killed. Default 2 s.
	CutDeadline time.Duration
	// StopGrace is how long a guest may take to power off. Default 10 s.
	StopGrace time.Duration
	// BootGrace is how long after a VM's start its agent may still be silent
	// before it is held to be absent. Default 30 s.
	BootGrace time.Duration
	// Segments is the number of PCI segments of each VM, which bounds its
	// grants. Default 5.
	Segments int
	// MaxGrants bounds the live grants of one VM. Default 256.
	MaxGrants int
	// GuestRequests is how many requests a minute one VM may put on record, for as
	// long as it likes, and GuestBurst how many at once. Default 12 and 120.
	GuestRequests, GuestBurst int
	// RotateAuditAt is at how many events the audit is rotated by itself. Zero:
	// never.
	RotateAuditAt int
	// Stretch multiplies every timeout that waits for a guest or a worker, the
	// cut deadline among them, for machines without hardware virtualisation.
	// It never stretches a lease. Default 1.
	Stretch float64

	Clock clock.Clock
	Log   *slog.Logger
	// Ready is called once, when the broker is ready. May be nil.
	Ready func()
	// Version is what health reports.
	Version string
}

func (o *Options) defaults() error {
	for name, v := range map[string]string{
		"state directory": o.StateDir, "runtime directory": o.RuntimeDir, "VMM": o.VMM,
		"virtiofsd": o.Virtiofsd, "shim": o.Shim,
	} {
		if v == "" {
			return fmt.Errorf("no %s is given", name)
		}
	}
	if len(o.PolicyWorker) == 0 {
		return fmt.Errorf("no policy worker is given")
	}
	// The longest socket of a VM must have a path that a socket can have.
	const longest = 107 - len("/vm/00000000-0000-4000-8000-000000000000/vsock.sock_65535")
	if len(o.RuntimeDir) > longest {
		return fmt.Errorf("the runtime directory %s has %d bytes; the paths of sockets beneath it leave room for %d", o.RuntimeDir, len(o.RuntimeDir), longest)
	}
	if o.Socket == "" {
		o.Socket = o.RuntimeDir + "/host.sock"
	}
	orElse(&o.SocketMode, 0o600)
	orElse(&o.CutDeadline, 2*time.Second)
	orElse(&o.StopGrace, 10*time.Second)
	orElse(&o.BootGrace, 30*time.Second)
	orElse(&o.Segments, 5)
	orElse(&o.MaxGrants, 256)
	orElse(&o.GuestRequests, 12)
	orElse(&o.GuestBurst, 120)
	orElse(&o.Stretch, 1)
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func orElse[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// stretched is d on this machine.
func (o *Options) stretched(d time.Duration) time.Duration {
	return time.Duration(float64(d) * o.Stretch)
}
