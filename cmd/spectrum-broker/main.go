// Command spectrum-broker is the host daemon of the capability broker.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
)

// workerArgument makes the program a policy worker instead.
const workerArgument = "policy-worker"

func main() {
	if len(os.Args) == 2 && os.Args[1] == workerArgument {
		os.Exit(policy.WorkerMain())
	}
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "spectrum-broker:", err)
		os.Exit(1)
	}
}

// wiring is the one place where a kind of capability meets what applies it.
func wiring() broker.Wiring {
	return broker.Wiring{
		Kinds: []capabilities.Kind{capabilities.FS{}},
		Appliers: func(b *broker.Broker) []reconcile.Applier {
			return []reconcile.Applier{broker.FileApplier(b)}
		},
	}
}

func command() *cobra.Command {
	o := broker.Options{Version: version()}
	var mode, level string
	var builtin, partitions, hostPolicy string
	c := &cobra.Command{
		Use:   "spectrum-broker",
		Short: "Grant capabilities to virtual machines as Rego policies decide, and take them back",
		Long: `spectrum-broker is the host daemon of the capability broker. It serves people on
a UNIX socket (see spectrum-cap) and each virtual machine on a socket of its
own. It needs root. VMs, and what was granted to them, outlive it.`,
		Example: `  spectrum-broker --partitions /run/spectrum/partitions
  spectrum-broker --state /var/lib/spectrum-broker --socket-mode 0660 --socket-group wheel`,
		Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true, Version: o.Version,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Builtin, o.Partitions, o.HostPolicy = sources.HostPath(builtin), sources.HostPath(partitions), sources.HostPath(hostPolicy)
			return run(cmd.Context(), o, mode, level)
		},
	}
	f := c.Flags()
	f.StringVar(&o.StateDir, "state", "/var/lib/spectrum-broker", "directory of the ledger and the signing key")
	f.StringVar(&o.RuntimeDir, "runtime", "/run/spectrum-broker", "directory of sockets and running VMs; must not outlive a boot")
	f.StringVar(&builtin, "builtin", "", "directory of built-in VM definitions")
	f.StringVar(&partitions, "partitions", "/run/spectrum/partitions", "directory with one directory for each user partition, named by its UUID")
	f.StringVar(&hostPolicy, "host-policy", "/etc/spectrum-broker/policy", "directory of the host's Rego files")
	f.StringVar(&o.Socket, "socket", "", "socket of the host API (default RUNTIME/host.sock)")
	f.StringVar(&mode, "socket-mode", "0600", "mode of the host socket, octal")
	f.StringVar(&o.SocketGroup, "socket-group", "", "group of the host socket, name or number")
	f.StringVar(&o.VMM, "vmm", "cloud-hypervisor", "virtual machine monitor, a path or a name on PATH")
	f.StringVar(&o.Virtiofsd, "virtiofsd", "virtiofsd", "virtio-fs daemon, a path or a name on PATH")
	f.StringVar(&o.Shim, "shim", "spectrum-shim", "the shim, a path or a name on PATH or beside this program")
	f.DurationVar(&o.CutDeadline, "cut-deadline", 0, "how long a guest may take to let go before it is cut off (default 2s)")
	f.DurationVar(&o.StopGrace, "stop-grace", 0, "how long a guest may take to power off (default 10s)")
	f.DurationVar(&o.BootGrace, "boot-grace", 0, "how long after its start a VM's agent may be silent (default 30s)")
	f.IntVar(&o.Segments, "pci-segments", 0, "PCI segments of each VM; each holds 29 grants (default 5)")
	f.IntVar(&o.MaxGrants, "max-grants", 0, "live grants that one VM may hold (default 256)")
	f.IntVar(&o.GuestRequests, "guest-requests", 0, "requests a minute that one VM may make for as long as it likes (default 12)")
	f.IntVar(&o.GuestBurst, "guest-burst", 0, "requests that one VM may make at once (default 120)")
	f.Float64Var(&o.Stretch, "stretch", 1, "factor on every timeout that waits for a guest or a worker, for slow machines")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return c
}

func run(ctx context.Context, o broker.Options, mode, level string) error {
	bits, err := strconv.ParseUint(mode, 8, 32)
	if err != nil || bits > 0o777 {
		return fmt.Errorf("--socket-mode %q is not an octal mode such as 0660", mode)
	}
	o.SocketMode = fs.FileMode(bits)
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return fmt.Errorf("--log-level %q is none of debug, info, warn and error", level)
	}
	for name, n := range map[string]int{
		"pci-segments": o.Segments, "max-grants": o.MaxGrants, "guest-requests": o.GuestRequests, "guest-burst": o.GuestBurst,
	} {
		if n < 0 {
			return fmt.Errorf("--%s %d is less than 1", name, n)
		}
	}
	if o.Stretch < 1 {
		return fmt.Errorf("--stretch %v is less than 1", o.Stretch)
	}
	o.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l}))
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find this program's file: %w", err)
	}
	o.PolicyWorker = []string{self, workerArgument}
	for name, program := range map[string]*string{"vmm": &o.VMM, "virtiofsd": &o.Virtiofsd, "shim": &o.Shim} {
		if *program, err = find(*program, filepath.Dir(self)); err != nil {
			return fmt.Errorf("--%s: %w", name, err)
		}
	}
	for _, dir := range []*string{&o.StateDir, &o.RuntimeDir} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	o.Ready = func() {
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			o.Log.Warn("cannot tell the service manager", "err", err)
		}
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err = broker.Run(ctx, o, wiring())
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return err
}

// find resolves a program to an absolute path: beside this one, else on PATH.
func find(program, beside string) (string, error) {
	if filepath.Base(program) == program {
		if path := filepath.Join(beside, program); isProgram(path) {
			return path, nil
		}
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("cannot find the program %q", program)
	}
	return filepath.Abs(path)
}

func isProgram(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
