// Command spectrum-broker is the host daemon of the capability broker.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
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
	os.Exit(start(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// start runs the command and returns its exit code.
func start(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := command()
	c.SetArgs(args)
	c.SetOut(stdout)
	c.SetErr(stderr)
	err := c.ExecuteContext(ctx)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "spectrum-broker:", err)
	}
	if exitCode(err) == exitUsage {
		_, _ = fmt.Fprintln(stderr, "See 'spectrum-broker --help'.")
	}
	return exitCode(err)
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
	var v flags
	c := &cobra.Command{
		Use:   "spectrum-broker",
		Short: "Grant capabilities to virtual machines as Rego policies decide, and take them back",
		Long: `spectrum-broker is the host daemon of the capability broker. It serves people on
a UNIX socket (see spectrum-cap) and each virtual machine on a socket of its
own. It needs root. VMs, and what was granted to them, outlive it.

` + exitCodeText,
		Example: `  spectrum-broker --partitions /run/spectrum/partitions
  spectrum-broker --state /var/lib/spectrum-broker --socket-mode 0660 --socket-group wheel`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("it takes flags only, not %q", args[0])
			}
			return nil
		},
		SilenceUsage: true, SilenceErrors: true, Version: o.Version,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level, err := v.check(&o)
			if err != nil {
				return err
			}
			o.Builtin, o.Partitions, o.HostPolicy = sources.HostPath(v.builtin), sources.HostPath(v.partitions), sources.HostPath(v.hostPolicy)
			o.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
			return run(cmd.Context(), o)
		},
	}
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	register(c.Flags(), &o, &v)
	return c
}

func run(ctx context.Context, o broker.Options) error {
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
