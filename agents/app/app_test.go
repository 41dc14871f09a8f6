package app

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"spectrum-os.org/broker/agents/wire"
)

// fakeKernel has the devices it is told of and keeps the kernel's habits: no
// device, no mount; a mount whose device goes stays, dead, until unmounted.
type fakeKernel struct {
	mu      sync.Mutex
	devices map[string]bool
	mounts  map[string]wire.Mount
	hang    chan struct{} // Gone blocks on it
	fail    error         // Unmount fails with it
	// then is run once, after the next Mount or Gone and before it returns.
	then func()
}

func (k *fakeKernel) after() {
	k.mu.Lock()
	then := k.then
	k.then = nil
	k.mu.Unlock()
	if then != nil {
		then()
	}
}

func newFakeKernel(tags ...string) *fakeKernel {
	k := &fakeKernel{devices: map[string]bool{}, mounts: map[string]wire.Mount{}}
	for _, tag := range tags {
		k.devices[tag] = true
	}
	return k
}

func (k *fakeKernel) plug(tag string, there bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.devices[tag] = there
}

func (k *fakeKernel) Mount(tag, target string, readOnly bool) error {
	defer k.after()
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.devices[tag] {
		return ErrNoDevice
	}
	if _, ok := k.mounts[target]; ok {
		return errors.New("mounted over")
	}
	k.mounts[target] = wire.Mount{Label: filepath.Base(target), Tag: tag, Path: target, ReadOnly: readOnly}
	return nil
}

func (k *fakeKernel) Unmount(target string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	delete(k.mounts, target)
	return nil
}

func (k *fakeKernel) Gone(target string) bool {
	if k.hang != nil {
		<-k.hang
	}
	defer k.after()
	k.mu.Lock()
	defer k.mu.Unlock()
	m, ok := k.mounts[target]
	return !ok || !k.devices[m.Tag]
}

func (k *fakeKernel) Mounted() ([]wire.Mount, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []wire.Mount
	for _, m := range k.mounts {
		out = append(out, m)
	}
	return out, nil
}

// agent serves k over a UNIX socket and returns its table and a client.
func agent(t *testing.T, k *fakeKernel) (*Mounts, *wire.Client) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	m, err := NewMounts(k, log)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := NewServer(m, wire.Health{Agent: "a", Version: "1", Role: "app", BootID: "b"}, log).HTTP()
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-served })
	return m, wire.NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	})
}

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func code(err error) wire.Code {
	if e, ok := errors.AsType[*wire.AgentError](err); ok {
		return e.Code
	}
	return ""
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("never: " + what)
}

func TestMountListUnmount(t *testing.T) {
	_, client := agent(t, newFakeKernel("g-1"))
	ctx := deadline(t)
	r := wire.MountRequest{Tag: "g-1", Label: "x", ReadOnly: true, TimeoutMS: 1000}
	for range 2 {
		reply, err := client.Mount(ctx, r)
		if err != nil || reply.Path != "/run/spectrum/fs/x" {
			t.Fatalf("%+v, %v", reply, err)
		}
	}
	other := r
	other.Tag = "g-2"
	if _, err := client.Mount(ctx, other); code(err) != wire.CodeConflict {
		t.Errorf("another device under the label: %v", err)
	}
	list, err := client.Mounts(ctx)
	if err != nil || len(list) != 1 || list[0].Tag != "g-1" || !list[0].ReadOnly {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := client.Unmount(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	if err := client.Unmount(ctx, "x"); code(err) != wire.CodeNotFound {
		t.Errorf("unmounting twice: %v", err)
	}
}

func TestMountWaitsForTheDevice(t *testing.T) {
	k := newFakeKernel()
	m, client := agent(t, k)
	ctx := deadline(t)
	done := make(chan error, 1)
	go func() {
		_, err := client.Mount(ctx, wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 5000})
		done <- err
	}()
	eventually(t, "the request is under way", func() bool {
		return code(client.Unmount(ctx, "x")) == wire.CodeBusy
	})
	k.plug("g-1", true)
	m.DevicesChanged(true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	_, err := client.Mount(ctx, wire.MountRequest{Tag: "never", Label: "y", TimeoutMS: 20})
	if code(err) != wire.CodeTimeout {
		t.Errorf("no device: %v", err)
	}
	if list, _ := client.Mounts(ctx); len(list) != 1 {
		t.Errorf("a mount that failed is listed: %+v", list)
	}
}

func TestDirectoryGoesWithItsDevice(t *testing.T) {
	k := newFakeKernel("g-1", "g-2")
	m, client := agent(t, k)
	ctx := deadline(t)
	for label, tag := range map[string]string{"x": "g-1", "y": "g-2"} {
		if _, err := client.Mount(ctx, wire.MountRequest{Tag: tag, Label: label, TimeoutMS: 100}); err != nil {
			t.Fatal(err)
		}
	}
	k.plug("g-1", false)
	m.DevicesChanged(true)
	eventually(t, "the dead mount goes", func() bool {
		left, _ := k.Mounted()
		return len(left) == 1 && left[0].Label == "y" && len(m.List()) == 1
	})
}

// An event that comes while a mount is made, or is found to be alive, is not
// passed over: there may be no other.
func TestDeviceGoesMeanwhile(t *testing.T) {
	for _, meanwhile := range []string{"mounted", "checked"} {
		t.Run(meanwhile, func(t *testing.T) {
			k := newFakeKernel("g-1")
			m, client := agent(t, k)
			ctx := deadline(t)
			goes := func() {
				k.plug("g-1", false)
				m.DevicesChanged(true)
			}
			if meanwhile == "mounted" {
				k.then = goes
			}
			if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 100}); err != nil {
				t.Fatal(err)
			}
			if meanwhile == "checked" {
				k.mu.Lock()
				k.then = goes
				k.mu.Unlock()
				m.DevicesChanged(true)
			}
			eventually(t, "the dead mount goes", func() bool {
				left, _ := k.Mounted()
				return len(left) == 0 && len(m.List()) == 0
			})
		})
	}
}

// A device that comes is no reason to ask others whether they are gone.
func TestNewDeviceAsksNoOther(t *testing.T) {
	k := newFakeKernel("g-1")
	m, client := agent(t, k)
	if _, err := client.Mount(deadline(t), wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{})
	k.mu.Lock()
	k.then = func() { close(asked) }
	k.mu.Unlock()
	m.DevicesChanged(false)
	select {
	case <-asked:
		t.Error("it was asked")
	case <-time.After(100 * time.Millisecond):
	}
	m.DevicesChanged(true)
	<-asked
}

func TestUevents(t *testing.T) {
	for event, want := range map[string][2]bool{
		"remove@/devices/pci0/virtio3\x00ACTION=remove\x00SUBSYSTEM=virtio\x00": {true, true},
		"unbind@/devices/pci0/virtio3\x00ACTION=unbind\x00SUBSYSTEM=virtio\x00": {true, true},
		"add@/devices/pci0/virtio3\x00ACTION=add\x00SUBSYSTEM=virtio\x00":       {true, false},
		"remove@/devices/pci0/net0\x00ACTION=remove\x00SUBSYSTEM=net\x00":       {false, true},
		"removed@/devices/virtio3\x00SUBSYSTEM=virtio\x00":                      {true, false},
		"": {false, false},
	} {
		if got := [2]bool{aboutVirtio([]byte(event)), goes([]byte(event))}; got != want {
			t.Errorf("%q: about virtio, goes: %v, want %v", event, got, want)
		}
	}
}

func TestDeadMountGivesWayToTheNext(t *testing.T) {
	k := newFakeKernel("g-1")
	_, client := agent(t, k)
	ctx := deadline(t)
	if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
	k.plug("g-1", false)
	k.plug("g-2", true)
	if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-2", Label: "x", TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
}

func TestHungDeviceHoldsUpNobody(t *testing.T) {
	k := newFakeKernel("g-1", "g-2")
	k.hang = make(chan struct{})
	m, client := agent(t, k)
	ctx := deadline(t)
	if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		m.DevicesChanged(true) // must not pile up checks either
	}
	if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-2", Label: "y", TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
	if err := client.Unmount(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	close(k.hang)
	eventually(t, "only y is left", func() bool { return len(m.List()) == 1 })
}

func TestUnmountThatFailsIsKept(t *testing.T) {
	k := newFakeKernel("g-1")
	m, client := agent(t, k)
	ctx := deadline(t)
	if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
	k.fail = errors.New("no")
	if err := client.Unmount(ctx, "x"); code(err) != wire.CodeFailed {
		t.Fatal(err)
	}
	if len(m.List()) != 1 {
		t.Error("the mount was forgotten")
	}
	k.fail = nil
	if err := client.Unmount(ctx, "x"); err != nil {
		t.Error(err)
	}
}

func TestRestartedAgentTakesOver(t *testing.T) {
	k := newFakeKernel("g-1")
	if err := k.Mount("g-1", wire.MountPath("x"), true); err != nil {
		t.Fatal(err)
	}
	_, client := agent(t, k)
	ctx := deadline(t)
	if _, err := client.Mount(ctx, wire.MountRequest{Tag: "g-1", Label: "x", ReadOnly: true, TimeoutMS: 100}); err != nil {
		t.Fatal(err)
	}
	if err := client.Unmount(ctx, "x"); err != nil {
		t.Fatal(err)
	}
}

func TestConcurrentRequestsForOneLabel(t *testing.T) {
	k := newFakeKernel("g-1")
	m, _ := agent(t, k)
	var made atomic.Int32
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			_, err := m.Mount(t.Context(), wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 1000})
			switch {
			case err == nil:
				made.Add(1)
			case !errors.Is(err, ErrUnderWay):
				t.Error(err)
			}
		})
	}
	all.Wait()
	if left, _ := k.Mounted(); made.Load() == 0 || len(left) != 1 {
		t.Errorf("%d successes, mounts %+v", made.Load(), left)
	}
}

// failing is a listener that breaks after its first connection.
type failing struct {
	net.Listener
	used bool
}

func (l *failing) Accept() (net.Conn, error) {
	if l.used {
		return nil, errors.New("transport reset")
	}
	l.used = true
	return l.Listener.Accept()
}

func TestServeListensAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	var opened atomic.Int32
	listen := func() (net.Listener, error) {
		if opened.Add(1) == 2 {
			return nil, errors.New("no device yet")
		}
		l, err := net.Listen("unix", path)
		return &failing{Listener: l}, err
	}
	log := slog.New(slog.DiscardHandler)
	m, err := NewMounts(newFakeKernel(), log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, NewServer(m, wire.Health{Agent: "a"}, log).HTTP(), listen, log) }()
	client := wire.NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	})
	for opened.Load() < 4 {
		try, stop := context.WithTimeout(ctx, time.Second)
		_, _ = client.Health(try)
		stop()
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestOnlyTheHostIsServed(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 2)
	seen := 0
	guarded := hostOnly{Listener: l, from: func(net.Addr) bool { seen++; return seen > 1 }}
	go func() {
		if conn, err := guarded.Accept(); err == nil {
			accepted <- conn
		}
	}()
	stranger, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.Read(make([]byte, 1)); err == nil {
		t.Error("a stranger was answered")
	}
	host, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	(<-accepted).Close()
	_, _, _ = stranger.Close(), host.Close(), l.Close()
	if fromHost(&net.UnixAddr{}) {
		t.Error("an address that is no vsock's passes as the host's")
	}
}

func TestWatchWakesAndEnds(t *testing.T) {
	k := newFakeKernel("g-1")
	log := slog.New(slog.DiscardHandler)
	m, err := NewMounts(k, log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Mount(t.Context(), wire.MountRequest{Tag: "g-1", Label: "x", TimeoutMS: 10}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	fire := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		Watch(ctx, m, func(ctx context.Context, wake func(gone bool)) error {
			select {
			case <-fire:
				wake(true)
			case <-ctx.Done():
			}
			return errors.New("broken")
		}, log)
	}()
	k.plug("g-1", false)
	fire <- struct{}{}
	eventually(t, "the event is acted on", func() bool { return len(m.List()) == 0 })
	cancel()
	<-done
}

func TestMalformedRequests(t *testing.T) {
	for body, want := range map[string]error{
		`{"tag":"t","label":"L","timeout_ms":1}`:             wire.ErrLabel,
		`{"tag":"t","label":"l","timeout_ms":0}`:             wire.ErrTimeout,
		`{"tag":"","label":"l","timeout_ms":1}`:              wire.ErrTag,
		`{"tag":"t","label":"l","timeout_ms":1,"file":".."}`: wire.ErrFile,
	} {
		if _, err := parseMount([]byte(body)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", body, err, want)
		}
	}
}

func TestEveryRouteRefusesInItsOwnWords(t *testing.T) {
	for err, want := range map[error]int{
		errNoRoute: http.StatusNotFound, ErrConflict: http.StatusConflict, ErrTooMany: http.StatusServiceUnavailable,
		badRequest{wire.ErrTag}: http.StatusBadRequest, errors.New("?"): http.StatusInternalServerError,
	} {
		w := &recorder{header: http.Header{}}
		refuse(w, err)
		if w.status != want {
			t.Errorf("%v: %d, want %d", err, w.status, want)
		}
	}
}

type recorder struct {
	header http.Header
	status int
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return len(b), nil }
