package contract

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/vmm"
)

var (
	vmmFlag       = flag.String("vmm", os.Getenv("SPECTRUM_VMM"), "cloud-hypervisor, or a program that speaks its API")
	virtiofsdFlag = flag.String("virtiofsd", os.Getenv("SPECTRUM_VIRTIOFSD"), "the virtio-fs daemon")
	kernelFlag    = flag.String("kernel", os.Getenv("SPECTRUM_KERNEL"), "the guest's kernel")
	initramfsFlag = flag.String("initramfs", os.Getenv("SPECTRUM_INITRAMFS"), "the guest's initramfs, with the exec service")
	stretchFlag   = flag.Float64("stretch", envFloat("SPECTRUM_STRETCH", 1), "factor on every timeout")
	slowFlag      = flag.Bool("slow", false, "also try the calls that block for a minute")
)

func envFloat(name string, unset float64) float64 {
	if v, err := strconv.ParseFloat(os.Getenv(name), 64); err == nil {
		return v
	}
	return unset
}

func stretch(d time.Duration) time.Duration { return time.Duration(float64(d) * *stretchFlag) }

// need skips, loudly, where the flags do not say what to run.
func need(t *testing.T) {
	t.Helper()
	for name, value := range map[string]*string{
		"-vmm": vmmFlag, "-virtiofsd": virtiofsdFlag, "-kernel": kernelFlag, "-initramfs": initramfsFlag,
	} {
		if *value == "" {
			t.Skipf("SKIP needs %s: name a VMM and a guest to hold the client against (see the package's documentation)", name)
		}
	}
}

// segments is how many PCI segments the VMs get.
const segments = 3

// machine is a VMM with at most one VM, in a directory of its own.
type machine struct {
	t      *testing.T
	dir    string
	api    *vmm.Client
	guest  *execclient.Client
	cmd    *exec.Cmd
	exited chan struct{} // closed when the VMM is gone; cmd.ProcessState is set

	mu     sync.Mutex
	events []vmm.Event
	news   chan struct{} // closed and replaced with every event
}

// startVMM starts a VMM that has no VM yet. It is killed when the test ends.
func startVMM(t *testing.T) *machine {
	t.Helper()
	// Sockets' paths are short; test names are not.
	dir, err := os.MkdirTemp("", "contract")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	log, err := os.Create(filepath.Join(dir, "vmm.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	m := &machine{
		t: t, dir: dir, api: vmm.NewClient(filepath.Join(dir, "vmm.sock")),
		guest:  execclient.NewHybrid(filepath.Join(dir, "vsock.sock")),
		exited: make(chan struct{}), news: make(chan struct{}),
	}
	m.cmd = exec.Command(*vmmFlag, "--api-socket", "path="+m.api.Socket(), "--event-monitor", "fd=3")
	m.cmd.ExtraFiles = []*os.File{w}
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := m.cmd.Start(); err != nil {
		t.Fatalf("cannot start the VMM: %v", err)
	}
	var reading sync.WaitGroup
	reading.Go(func() { m.readEvents(r) })
	go func() {
		_ = m.cmd.Wait()
		close(m.exited)
	}()
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		<-m.exited
		r.Close()
		reading.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(filepath.Join(dir, "vmm.log"))
			t.Logf("the VMM said:\n%s", text)
		}
	})
	m.eventually("the VMM answers", 10*time.Second, func() bool {
		ctx, cancel := m.soon()
		defer cancel()
		_, err := m.api.Ping(ctx)
		return err == nil
	})
	return m
}

func (m *machine) readEvents(r io.Reader) {
	events := vmm.NewEvents(r)
	for {
		e, err := events.Next()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
				m.t.Errorf("the event stream cannot be read: %v", err)
			}
			return
		}
		m.mu.Lock()
		m.events = append(m.events, e)
		close(m.news)
		m.news = make(chan struct{})
		m.mu.Unlock()
	}
}

// await waits for an event of which match is true, among all since the start.
func (m *machine) await(within time.Duration, what string, match func(vmm.Event) bool) {
	m.t.Helper()
	timeout := time.After(stretch(within))
	for {
		m.mu.Lock()
		found, news := slices.ContainsFunc(m.events, match), m.news
		m.mu.Unlock()
		if found {
			return
		}
		select {
		case <-news:
		case <-timeout:
			m.t.Fatalf("no event %s within %v", what, stretch(within))
		}
	}
}

func (m *machine) awaitEvent(within time.Duration, name vmm.EventName) {
	m.t.Helper()
	m.await(within, fmt.Sprint(name), func(e vmm.Event) bool { return e.EventName == name })
}

func (m *machine) saw(name vmm.EventName) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.events, func(e vmm.Event) bool { return e.EventName == name })
}

func (m *machine) eventually(what string, within time.Duration, done func() bool) {
	m.t.Helper()
	deadline := time.Now().Add(stretch(within))
	for !done() {
		if time.Now().After(deadline) {
			m.t.Fatalf("not within %v: %s", stretch(within), what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// soon is the context of a call that must not take long.
func (m *machine) soon() (context.Context, context.CancelFunc) {
	return context.WithTimeout(m.t.Context(), stretch(20*time.Second))
}

// do makes a call that must succeed.
func (m *machine) do(what string, call func(context.Context) error) {
	m.t.Helper()
	ctx, cancel := m.soon()
	defer cancel()
	if err := call(ctx); err != nil {
		m.t.Fatalf("%s: %v", what, err)
	}
}

// refuse makes a call that the VMM must answer with the status, and with an
// error that is the sentinel, unless that is nil.
func (m *machine) refuse(what string, status int, sentinel error, call func(context.Context) error) {
	m.t.Helper()
	ctx, cancel := m.soon()
	defer cancel()
	err := call(ctx)
	var answered *vmm.Error
	if !errors.As(err, &answered) {
		m.t.Fatalf("%s: got %v, want an answer with status %d", what, err, status)
	}
	if answered.Status != status || len(answered.Messages) == 0 {
		m.t.Fatalf("%s: status %d, %q; want %d and a reason", what, answered.Status, answered.Messages, status)
	}
	if sentinel != nil && !errors.Is(err, sentinel) {
		m.t.Errorf("%s: %v is not «%v»", what, err, sentinel)
	}
}

func (m *machine) config() vmm.VMConfig {
	return vmm.VMConfig{
		Payload:  vmm.PayloadConfig{Kernel: *kernelFlag, Initramfs: *initramfsFlag, Cmdline: "console=ttyS0 quiet panic=-1"},
		Cpus:     vmm.CPUsConfig{BootVCPUs: 1, MaxVCPUs: 1},
		Memory:   vmm.MemoryConfig{Size: 256 << 20, Shared: true},
		Platform: vmm.PlatformConfig{NumPCISegments: segments},
		RNG:      vmm.RNGConfig{Src: "/dev/urandom"},
		Vsock:    vmm.VsockConfig{CID: 3, Socket: filepath.Join(m.dir, "vsock.sock")},
		Serial:   vmm.ConsoleConfig{Mode: vmm.ConsoleFile, File: filepath.Join(m.dir, "serial.log")},
		Console:  vmm.ConsoleConfig{Mode: vmm.ConsoleOff},
	}
}

// awaitGuest returns when the guest runs commands.
func (m *machine) awaitGuest() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), stretch(90*time.Second))
	defer cancel()
	if err := m.guest.Await(ctx); err != nil {
		text, _ := os.ReadFile(filepath.Join(m.dir, "serial.log"))
		m.t.Fatalf("%v\nserial port:\n%s", err, text)
	}
}

// shell runs a line in the guest, which must succeed.
func (m *machine) shell(line string) string {
	m.t.Helper()
	ctx, cancel := m.soon()
	defer cancel()
	out, err := m.guest.Shell(ctx, line)
	if err != nil {
		m.t.Fatalf("in the guest, %s: %v", line, err)
	}
	return out
}

// mount mounts the tag, which may take the guest an instant to find.
func (m *machine) mount(tag, at string) {
	m.t.Helper()
	m.shell(fmt.Sprintf("mkdir -p %s; n=0; until mount -t virtiofs %s %s 2>/dev/null; do n=$((n+1)); [ $n -lt 100 ] || exit 1; sleep 0.1; done", at, tag, at))
}

func (m *machine) info() vmm.Info {
	m.t.Helper()
	ctx, cancel := m.soon()
	defer cancel()
	info, err := m.api.Info(ctx)
	if err != nil {
		m.t.Fatalf("vm.info: %v", err)
	}
	return info
}

func (m *machine) has(id string) bool {
	m.t.Helper()
	_, ok := m.info().DeviceTree[id]
	return ok
}

// share is a virtiofsd that serves a directory, listening before it starts.
type share struct {
	dir, socket string
	cmd         *exec.Cmd
	exited      chan struct{}
}

func (m *machine) share(name string) *share {
	m.t.Helper()
	s := &share{
		dir: filepath.Join(m.dir, name), socket: filepath.Join(m.dir, name+".sock"),
		exited: make(chan struct{}),
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "hello"), []byte("hello "+name+"\n"), 0o644); err != nil {
		m.t.Fatal(err)
	}
	_ = os.Remove(s.socket)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		m.t.Fatal(err)
	}
	defer listener.Close()
	listener.SetUnlinkOnClose(false)
	f, err := listener.File()
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	s.cmd = exec.Command(*virtiofsdFlag, "--fd=3", "--shared-dir="+s.dir, "--sandbox=none", "--seccomp=none", "--log-level=error")
	s.cmd.ExtraFiles = []*os.File{f}
	if err := s.cmd.Start(); err != nil {
		m.t.Fatalf("cannot start virtiofsd: %v", err)
	}
	go func() {
		_ = s.cmd.Wait()
		close(s.exited)
	}()
	m.t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-s.exited
	})
	return s
}

func (s *share) running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

func (m *machine) fsConfig(id string, s *share, segment int) vmm.FSConfig {
	return vmm.FSConfig{ID: id, Tag: "tag-" + id, Socket: s.socket, NumQueues: 1, QueueSize: 1024, PCISegment: segment}
}

// addFS attaches the share.
func (m *machine) addFS(id string, s *share, segment int) string {
	m.t.Helper()
	var bdf string
	m.do("vm.add-fs", func(ctx context.Context) (err error) {
		bdf, err = m.api.AddFS(ctx, m.fsConfig(id, s, segment))
		return err
	})
	return bdf
}

// awaitGone waits until a removed device is gone in every way.
func (m *machine) awaitGone(id string, s *share) {
	m.t.Helper()
	m.eventually("virtiofsd of "+id+" exits by itself", 15*time.Second, func() bool { return !s.running() })
	m.eventually(id+" leaves the device tree", 5*time.Second, func() bool { return !m.has(id) })
	m.await(5*time.Second, "device-removed of "+id, func(e vmm.Event) bool {
		return e.EventName == vmm.EventRemoved && e.Properties["id"] == id
	})
}
