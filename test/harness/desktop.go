package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/guest/execclient"
)

// Desktop is a broker and its world beneath one directory.
type Desktop struct {
	Tools  Tools
	Dir    string
	Client *api.Client
	// BrokerArgs are further arguments of the broker.
	BrokerArgs []string
	// BrokerEnv is added to the broker's environment.
	BrokerEnv []string
	// State is the state directory, where it is not beneath Dir.
	State string

	mu     sync.Mutex
	broker *exec.Cmd
	exited chan struct{}
}

// New makes the directories of a desktop with nothing in it.
func New(tools Tools, dir string) (*Desktop, error) {
	d := &Desktop{Tools: tools, Dir: dir}
	for _, sub := range []string{"state", "run", "partitions", "builtin", "host-policy"} {
		if err := os.MkdirAll(d.path(sub), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(d.path("state"), 0o700); err != nil {
		return nil, err
	}
	d.Client = api.NewClient(d.Socket())
	return d, nil
}

func (d *Desktop) path(parts ...string) string {
	return filepath.Join(append([]string{d.Dir}, parts...)...)
}

// Socket is the broker's host socket.
func (d *Desktop) Socket() string { return d.path("run", "host.sock") }

// StateDir is where the ledger is.
func (d *Desktop) StateDir() string {
	if d.State != "" {
		return d.State
	}
	return d.path("state")
}

// VMDir is a VM's runtime directory.
func (d *Desktop) VMDir(vm uuid.UUID) string { return d.path("run", "vm", vm.String()) }

// Partition is a user partition of the desktop.
type Partition struct {
	ID  uuid.UUID
	Dir string
}

// AddPartition makes a partition with files (path beneath files/ to content)
// and a policy (file name to Rego).
func (d *Desktop) AddPartition(files, policies map[string]string) (Partition, error) {
	p := Partition{ID: uuid.New()}
	p.Dir = d.path("partitions", p.ID.String())
	for _, sub := range []string{"files", "svc/data", "svc/policy"} {
		if err := os.MkdirAll(filepath.Join(p.Dir, sub), 0o755); err != nil {
			return p, err
		}
	}
	for name, content := range files {
		if err := write(filepath.Join(p.Dir, "files", name), content); err != nil {
			return p, err
		}
	}
	for name, content := range policies {
		if err := write(filepath.Join(p.Dir, "svc/policy", name), content); err != nil {
			return p, err
		}
	}
	return p, nil
}

// HostPolicy writes one file of the host's policy.
func (d *Desktop) HostPolicy(name, content string) error {
	return write(d.path("host-policy", name), content)
}

// AddVM makes a VM's definition and returns the VM's UUID. The partition
// carries kernel and initramfs as hard links where it can.
func (d *Desktop) AddVM(p Partition, alias, toml string) (uuid.UUID, error) {
	id := uuid.New()
	dir := filepath.Join(p.Dir, "svc/data", alias)
	if err := os.MkdirAll(filepath.Join(dir, "providers/net"), 0o755); err != nil {
		return id, err
	}
	err := errors.Join(
		write(filepath.Join(dir, "uuid"), id.String()+"\n"),
		write(filepath.Join(dir, "vm.toml"), toml),
		write(filepath.Join(dir, "cmdline"), "console=ttyS0 console=hvc0 quiet panic=-1 reboot=k\n"),
		link(d.Tools.Kernel, filepath.Join(dir, "vmlinux")),
		link(d.Tools.Initramfs, filepath.Join(dir, "initrd")),
	)
	return id, err
}

func write(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(content), 0o644)
}

func link(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// StartBroker starts the broker and returns when it is ready, or has ended.
func (d *Desktop) StartBroker(ctx context.Context) error {
	logFile, err := os.OpenFile(d.path("broker.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	from, err := logFile.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	args := append([]string{
		"--state", d.StateDir(), "--runtime", d.path("run"), "--partitions", d.path("partitions"),
		"--builtin", d.path("builtin"), "--host-policy", d.path("host-policy"),
		"--vmm", d.Tools.VMM, "--virtiofsd", d.Tools.Virtiofsd, "--shim", d.Tools.Shim,
		"--stretch", fmt.Sprint(d.Tools.Stretch),
	}, d.BrokerArgs...)
	// Not CommandContext: the broker outlives the context of its start.
	cmd := exec.Command(d.Tools.Broker, args...) //nolint:noctx // see above
	cmd.Env = append(os.Environ(), d.BrokerEnv...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// A session of its own: a Ctrl-C at the terminal is for whoever runs the
	// desktop, who then ends the broker in good order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start the broker: %w", err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	d.mu.Lock()
	d.broker, d.exited = cmd, exited
	d.mu.Unlock()
	for {
		probe, cancel := context.WithTimeout(ctx, time.Second)
		h, err := d.Client.Health(probe)
		cancel()
		if err == nil && h.Ready && h.PID == cmd.Process.Pid {
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("the broker ended: %s", tail(d.path("broker.log"), from))
		case <-ctx.Done():
			return fmt.Errorf("the broker is not ready: %w: %s", ctx.Err(), tail(d.path("broker.log"), from))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func tail(path string, from int64) string {
	raw, err := os.ReadFile(path)
	if err != nil || int64(len(raw)) < from {
		return fmt.Sprint(err)
	}
	raw = bytes.TrimSpace(raw[from:])
	const most = 4096
	if len(raw) > most {
		raw = raw[len(raw)-most:]
	}
	return string(raw)
}

// BrokerPID is the running broker's, or 0.
func (d *Desktop) BrokerPID() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broker == nil {
		return 0
	}
	return d.broker.Process.Pid
}

// BrokerExited is closed once the broker that was started last has ended; of
// one that was never started it is nil.
func (d *Desktop) BrokerExited() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.exited
}

// BrokerSignal is the signal that ended the broker, or -1.
func (d *Desktop) BrokerSignal() syscall.Signal {
	d.mu.Lock()
	cmd, exited := d.broker, d.exited
	d.mu.Unlock()
	if cmd == nil {
		return -1
	}
	select {
	case <-exited:
		return cmd.ProcessState.Sys().(syscall.WaitStatus).Signal()
	default:
		return -1
	}
}

// StopBroker sends the broker a signal and waits until it has ended.
func (d *Desktop) StopBroker(sig os.Signal) error {
	d.mu.Lock()
	cmd, exited := d.broker, d.exited
	d.broker = nil
	d.mu.Unlock()
	if cmd == nil {
		return nil
	}
	_ = cmd.Process.Signal(sig)
	select {
	case <-exited:
		return nil
	case <-time.After(d.Stretched(20 * time.Second)):
		_ = cmd.Process.Kill()
		<-exited
		return fmt.Errorf("the broker did not end on %v", sig)
	}
}

// Stretched is t on this machine.
func (d *Desktop) Stretched(t time.Duration) time.Duration {
	return time.Duration(float64(t) * d.Tools.Stretch)
}

// Guest runs commands in a VM.
func (d *Desktop) Guest(vm uuid.UUID) *execclient.Client {
	return execclient.NewHybrid(filepath.Join(d.VMDir(vm), "vsock.sock"))
}

// Boot starts a VM and returns when commands run in it.
func (d *Desktop) Boot(ctx context.Context, vm uuid.UUID) (*execclient.Client, error) {
	if _, err := d.Client.StartVM(ctx, vm.String()); err != nil {
		return nil, err
	}
	return d.Answers(ctx, vm)
}

// Answers returns when commands run in a VM that was started. On an emulated
// guest the vsock backend sometimes loses the guest while it boots and never
// finds it again; such a VM is booted again, once.
func (d *Desktop) Answers(ctx context.Context, vm uuid.UUID) (*execclient.Client, error) {
	g := d.Guest(vm)
	first, cancel := context.WithTimeout(ctx, d.Stretched(50*time.Second))
	err := g.Await(first)
	cancel()
	if err == nil || ctx.Err() != nil {
		return g, err
	}
	console, _ := os.ReadFile(filepath.Join(d.VMDir(vm), "console.log"))
	if len(console) > 2048 {
		console = console[len(console)-2048:]
	}
	fmt.Fprintf(os.Stderr, "VM %s does not answer over vsock and is booted again; its console ends in:\n%s\n", vm, console)
	now := 0.0
	if _, err := d.Client.StopVM(ctx, vm.String(), api.StopRequest{GraceSeconds: &now}); err != nil {
		return nil, err
	}
	if _, err := d.Client.StartVM(ctx, vm.String()); err != nil {
		return nil, err
	}
	return g, g.Await(ctx)
}

// Close ends the VMs and the broker. The directory stays.
func (d *Desktop) Close() error {
	var errs []error
	if d.BrokerPID() != 0 {
		ctx, cancel := context.WithTimeout(context.Background(), d.Stretched(30*time.Second))
		defer cancel()
		vms, err := d.Client.ListVMs(ctx)
		errs = append(errs, err)
		var wg sync.WaitGroup
		for _, vm := range vms {
			if vm.State == api.VMStopped {
				continue
			}
			wg.Go(func() {
				now := 0.0
				_, _ = d.Client.StopVM(ctx, vm.ID.String(), api.StopRequest{GraceSeconds: &now})
			})
		}
		wg.Wait()
		errs = append(errs, d.StopBroker(syscall.SIGTERM))
	}
	errs = append(errs, d.reap())
	return errors.Join(errs...)
}

// reap ends what a broker that was killed left.
func (d *Desktop) reap() error {
	dirs, err := filepath.Glob(d.path("run", "vm", "*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		err = errors.Join(err, reapVM(dir))
	}
	return err
}
