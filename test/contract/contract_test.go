package contract

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/vmm"
)

// TestContract walks one VM through its life. The steps share it, in this
// order, since a boot is the dearest of them.
func TestContract(t *testing.T) {
	need(t)
	m := startVMM(t)
	steps := []struct {
		name string
		step func(*machine)
	}{
		{"before there is a VM", beforeCreate},
		{"create", create},
		{"boot", boot},
		{"vsock", vsock},
		{"add-fs", addFS},
		{"a busy reader is drained", busyReader},
		{"a paused guest ejects nothing", pausedGuest},
		{"a segment is full", fullSegment},
		{"snapshot and restore", snapshot},
		{"reboot", reboot},
		{"reboot with a file system", rebootWithFS},
	}
	for _, s := range steps {
		ok := t.Run(s.name, func(t *testing.T) {
			// Helpers report to the step that called them.
			outer := m.t
			m.t = t
			defer func() { m.t = outer }()
			s.step(m)
		})
		if !ok {
			t.Fatalf("the steps after %q need what it should have left", s.name)
		}
	}
}

func beforeCreate(m *machine) {
	ctx, cancel := m.soon()
	defer cancel()
	ping, err := m.api.Ping(ctx)
	if err != nil || ping.Version == "" {
		m.t.Fatalf("ping: %+v, %v", ping, err)
	}
	notFound := func(what string, call func(context.Context) error) {
		m.t.Helper()
		m.refuse(what, http.StatusNotFound, vmm.ErrNotFound, call)
	}
	notFound("vm.info", func(ctx context.Context) error { _, err := m.api.Info(ctx); return err })
	notFound("vm.boot", m.api.Boot)
	notFound("vm.remove-device", func(ctx context.Context) error { return m.api.RemoveDevice(ctx, "x") })
	notFound("vm.add-fs", func(ctx context.Context) error {
		_, err := m.api.AddFS(ctx, vmm.FSConfig{ID: "x", Tag: "x", Socket: "/nowhere", NumQueues: 1, QueueSize: 1024})
		return err
	})
	m.refuse("vm.pause", http.StatusInternalServerError, nil, m.api.Pause)
}

func create(m *machine) {
	m.do("vm.create", func(ctx context.Context) error { return m.api.Create(ctx, m.config()) })
	m.refuse("vm.create again", http.StatusInternalServerError, nil, func(ctx context.Context) error { return m.api.Create(ctx, m.config()) })
	info := m.info()
	if info.State != vmm.StateCreated || info.DeviceTree != nil || info.Config.Vsock.Socket != m.config().Vsock.Socket {
		m.t.Errorf("vm.info after vm.create: %+v", info)
	}
}

func boot(m *machine) {
	start := time.Now()
	m.do("vm.boot", m.api.Boot)
	m.awaitEvent(10*time.Second, vmm.EventBooted)
	m.awaitGuest()
	m.t.Logf("the guest answers %.1f s after vm.boot", time.Since(start).Seconds())
	if s := m.info().State; s != vmm.StateRunning {
		m.t.Errorf("state %s after vm.boot", s)
	}
	m.refuse("vm.boot again", http.StatusInternalServerError, nil, m.api.Boot)
}

func vsock(m *machine) {
	ctx, cancel := m.soon()
	defer cancel()
	// A port that nobody listens on: the connection ends, without an OK.
	conn, err := wire.DialHybrid(ctx, filepath.Join(m.dir, "vsock.sock"), 4711)
	if err == nil {
		conn.Close()
		m.t.Error("CONNECT to a port that nobody listens on was answered with OK")
	}
	if ctx.Err() != nil {
		m.t.Error("CONNECT to a port that nobody listens on was not answered at all")
	}
}

func addFS(m *machine) {
	s := m.share("one")
	bdf := m.addFS("one", s, 1)
	if !regexp.MustCompile(`^0001:00:[01][0-9a-f]\.0$`).MatchString(bdf) {
		m.t.Errorf("vm.add-fs on segment 1 answers bdf %q", bdf)
	}
	if !m.has("one") {
		m.t.Error("the device tree lacks the device that was added")
	}
	m.mount("tag-one", "/mnt/one")
	if got := m.shell("cat /mnt/one/hello"); got != "hello one" {
		m.t.Errorf("the guest reads %q", got)
	}

	other := m.share("other")
	m.refuse("vm.add-fs with a taken id", http.StatusConflict, vmm.ErrExists, func(ctx context.Context) error {
		_, err := m.api.AddFS(ctx, m.fsConfig("one", other, 1))
		return err
	})
	m.refuse("vm.add-fs on a segment that is not there", http.StatusBadRequest, nil, func(ctx context.Context) error {
		_, err := m.api.AddFS(ctx, m.fsConfig("other", other, segments))
		return err
	})
	if !other.running() {
		m.t.Error("a refused request touched the socket it named")
	}
	m.refuse("vm.remove-device of an unknown id", http.StatusNotFound, vmm.ErrNotFound, func(ctx context.Context) error {
		return m.api.RemoveDevice(ctx, "nobody")
	})

	m.shell("umount /mnt/one")
	m.do("vm.remove-device", func(ctx context.Context) error { return m.api.RemoveDevice(ctx, "one") })
	m.awaitGone("one", s)
}

func busyReader(m *machine) {
	s := m.share("busy")
	if err := os.WriteFile(filepath.Join(s.dir, "big"), make([]byte, 64<<20), 0o644); err != nil {
		m.t.Fatal(err)
	}
	m.addFS("busy", s, 2)
	m.mount("tag-busy", "/mnt/busy")
	ctx, cancel := m.soon()
	defer cancel()
	reader, err := m.guest.Start(ctx, execclient.Command{Argv: []string{
		"sh", "-c",
		"exec 3</mnt/busy/hello; echo reading; while echo 3 >/proc/sys/vm/drop_caches && cat /mnt/busy/big >/dev/null; do :; done; cat /mnt/busy/hello",
	}})
	if err != nil {
		m.t.Fatal(err)
	}
	defer reader.Kill()
	if err := reader.AwaitOutput(ctx, "reading"); err != nil {
		m.t.Fatal(err)
	}
	start := time.Now()
	m.do("vm.remove-device", func(ctx context.Context) error { return m.api.RemoveDevice(ctx, "busy") })
	m.awaitGone("busy", s)
	m.t.Logf("a busy reader was cut off %.2f s after vm.remove-device", time.Since(start).Seconds())
	result, err := reader.Wait()
	if err != nil {
		m.t.Fatal(err)
	}
	if result.Exit == 0 || !strings.Contains(string(result.Stderr), "not connected") {
		m.t.Errorf("the reader ended with %d, %q; want ENOTCONN", result.Exit, result.Stderr)
	}
	m.shell("umount -l /mnt/busy")

	// The same id, tag and segment serve again.
	again := m.share("busy")
	m.addFS("busy", again, 2)
	m.mount("tag-busy", "/mnt/again")
	m.shell("cat /mnt/again/hello && umount /mnt/again")
	m.do("vm.remove-device", func(ctx context.Context) error { return m.api.RemoveDevice(ctx, "busy") })
	m.awaitGoneAgain("busy", again)
}

// awaitGoneAgain is awaitGone for an id whose first removal was announced.
func (m *machine) awaitGoneAgain(id string, s *share) {
	m.t.Helper()
	m.eventually("virtiofsd exits by itself", 15*time.Second, func() bool { return !s.running() })
	m.eventually(id+" leaves the device tree", 5*time.Second, func() bool { return !m.has(id) })
}

func pausedGuest(m *machine) {
	s := m.share("paused")
	m.addFS("paused", s, 1)
	m.mount("tag-paused", "/mnt/paused")
	m.do("vm.pause", m.api.Pause)
	m.awaitEvent(5*time.Second, vmm.EventPaused)
	m.refuse("vm.pause again", http.StatusInternalServerError, nil, m.api.Pause)
	if state := m.info().State; state != vmm.StatePaused {
		m.t.Errorf("state %s after vm.pause", state)
	}
	m.do("vm.remove-device", func(ctx context.Context) error { return m.api.RemoveDevice(ctx, "paused") })
	time.Sleep(500 * time.Millisecond)
	if !s.running() || !m.has("paused") {
		m.t.Error("a device left a guest that stands still")
	}
	m.do("vm.resume", m.api.Resume)
	m.awaitEvent(5*time.Second, vmm.EventResumed)
	m.awaitGone("paused", s)
	m.shell("umount -l /mnt/paused")

	// A pause that meets traffic must not leave the vsock deaf.
	for range 20 {
		m.do("vm.pause", m.api.Pause)
		time.Sleep(20 * time.Millisecond)
		m.do("vm.resume", m.api.Resume)
		m.shell("true")
	}
}

// fullSegment fills the last segment. The broker counts on 29 a segment.
func fullSegment(m *machine) {
	const segment, promised, bus = segments - 1, 29, 31
	shares := map[string]*share{}
	start := time.Now()
	for n := 1; ; n++ {
		id := fmt.Sprint("fill", n)
		s := m.share(id)
		ctx, cancel := m.soon()
		_, err := m.api.AddFS(ctx, m.fsConfig(id, s, segment))
		cancel()
		if err == nil {
			shares[id] = s
			if n > bus {
				m.t.Fatalf("%d devices on one segment", n)
			}
			continue
		}
		var answered *vmm.Error
		if !errors.Is(err, vmm.ErrNoSlot) || !errors.As(err, &answered) || answered.Status != http.StatusInternalServerError {
			m.t.Fatalf("file system %d: %v; want a 500 that is ErrNoSlot", n, err)
		}
		if n <= promised {
			m.t.Errorf("only %d file systems fit on a segment", n-1)
		}
		m.eventually("the backend of the refused device exits", 5*time.Second, func() bool { return !s.running() })
		if m.has(id) {
			m.t.Error("the device tree lists the refused device")
		}
		m.t.Logf("%d file systems fit on segment %d, plugged in within %.1f s", n-1, segment, time.Since(start).Seconds())
		break
	}
	// The other segments still serve.
	s := m.share("beside")
	m.addFS("beside", s, 0)
	shares["beside"] = s
	start = time.Now()
	for id := range shares {
		m.do("vm.remove-device", func(ctx context.Context) error { return m.api.RemoveDevice(ctx, id) })
	}
	for id, s := range shares {
		m.awaitGone(id, s)
	}
	m.t.Logf("%d file systems ejected within %.1f s", len(shares), time.Since(start).Seconds())
}

func snapshot(m *machine) {
	dir := filepath.Join(m.dir, "snapshot")
	if err := os.Mkdir(dir, 0o700); err != nil {
		m.t.Fatal(err)
	}
	save := func(ctx context.Context) error { return m.api.Snapshot(ctx, dir) }
	m.refuse("vm.snapshot of a running VM", http.StatusInternalServerError, nil, save)
	id := m.shell("cat /proc/sys/kernel/random/boot_id")
	m.do("vm.pause", m.api.Pause)
	start := time.Now()
	m.do("vm.snapshot", save)
	m.t.Logf("saved in %.2f s", time.Since(start).Seconds())
	m.do("vm.resume", m.api.Resume)
	m.awaitGuest()

	clone := startVMM(m.t)
	start = time.Now()
	copied := cloneSnapshot(m, dir, clone.dir)
	clone.do("vm.restore", func(ctx context.Context) error { return clone.api.Restore(ctx, copied, true) })
	clone.awaitGuest()
	m.t.Logf("a clone answers %.2f s after vm.restore", time.Since(start).Seconds())
	if got := clone.shell("cat /proc/sys/kernel/random/boot_id"); got != id {
		m.t.Errorf("the clone's boot id is %s, its template's %s", got, id)
	}
	if state := clone.info().State; state != vmm.StateRunning {
		m.t.Errorf("the clone's state is %s", state)
	}
	// Hot-plug works in a clone.
	s := clone.share("cloned")
	clone.addFS("cloned", s, 1)
	clone.mount("tag-cloned", "/mnt/cloned")
	clone.shell("cat /mnt/cloned/hello")

	// The clone powers off, with a file system attached.
	ctx, cancel := clone.soon()
	defer cancel()
	_, _ = clone.guest.Shell(ctx, "poweroff -f")
	select {
	case <-clone.exited:
	case <-time.After(stretch(20 * time.Second)):
		m.t.Fatal("the VMM outlives its guest")
	}
	if code := clone.cmd.ProcessState.ExitCode(); code != 0 {
		m.t.Errorf("the VMM exits with %d after its guest powered off", code)
	}
	clone.awaitEvent(time.Second, vmm.EventShutdown)
	clone.awaitEvent(time.Second, vmm.EventVMMExit)
	clone.eventually("virtiofsd ends with the guest", 5*time.Second, func() bool { return !s.running() })
}

// cloneSnapshot makes a snapshot that a second VMM can restore beside the
// first: memory is linked, the sockets and files move to its own directory.
func cloneSnapshot(m *machine, from, dir string) string {
	m.t.Helper()
	to := filepath.Join(dir, "snapshot")
	if err := os.Mkdir(to, 0o700); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Link(filepath.Join(from, "memory-ranges"), filepath.Join(to, "memory-ranges")); err != nil {
		m.t.Fatal(err)
	}
	state, err := os.ReadFile(filepath.Join(from, "state.json"))
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(to, "state.json"), state, 0o600); err != nil {
		m.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(from, "config.json"))
	if err != nil {
		m.t.Fatal(err)
	}
	// Kept as it came, so that fields this project does not know survive.
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		m.t.Fatal(err)
	}
	config["vsock"].(map[string]any)["socket"] = filepath.Join(dir, "vsock.sock")
	config["serial"].(map[string]any)["file"] = filepath.Join(dir, "serial.log")
	if text, err = json.Marshal(config); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(to, "config.json"), text, 0o600); err != nil {
		m.t.Fatal(err)
	}
	return to
}

// rebootGuest makes the guest reboot itself.
func rebootGuest(m *machine) {
	m.t.Helper()
	ctx, cancel := m.soon()
	defer cancel()
	_, _ = m.guest.Shell(ctx, "reboot -f") // the answer is lost with the guest
}

func reboot(m *machine) {
	id := m.shell("cat /proc/sys/kernel/random/boot_id")
	rebootGuest(m)
	m.awaitEvent(20*time.Second, vmm.EventRebooting)
	m.awaitEvent(20*time.Second, vmm.EventRebooted)
	m.awaitGuest()
	if m.shell("cat /proc/sys/kernel/random/boot_id") == id {
		m.t.Error("the guest did not boot again")
	}
}

func rebootWithFS(m *machine) {
	s := m.share("lost")
	m.addFS("lost", s, 1)
	m.mount("tag-lost", "/mnt/lost")
	m.mu.Lock()
	m.events = nil // those of the first reboot
	m.mu.Unlock()
	rebootGuest(m)
	m.awaitEvent(20*time.Second, vmm.EventRebooting)
	m.eventually("virtiofsd ends with the guest", 10*time.Second, func() bool { return !s.running() })
	ctx, cancel := context.WithTimeout(m.t.Context(), 2*time.Second)
	defer cancel()
	if _, err := m.api.Ping(ctx); err == nil {
		m.t.Error("the VMM answers while it waits for a backend that is gone")
	}
	if !*slowFlag {
		return
	}
	select {
	case <-m.exited:
	case <-time.After(stretch(75 * time.Second)):
		m.t.Fatal("the VMM survives a reboot whose file system is gone")
	}
	if m.saw(vmm.EventRebooted) || m.cmd.ProcessState.ExitCode() == 0 {
		m.t.Error("the VMM calls a failed reboot a success")
	}
}

// TestNoListener tries the call that blocks the whole API for a minute.
func TestNoListener(t *testing.T) {
	need(t)
	if !*slowFlag {
		t.Skip("SKIP needs -slow: the call blocks for a minute")
	}
	m := startVMM(t)
	m.do("vm.create", func(ctx context.Context) error { return m.api.Create(ctx, m.config()) })
	m.do("vm.boot", m.api.Boot)
	start := time.Now()
	answer := make(chan error, 1)
	go func() {
		_, err := m.api.AddFS(t.Context(), vmm.FSConfig{
			ID: "x", Tag: "x", Socket: filepath.Join(m.dir, "nobody"), NumQueues: 1, QueueSize: 1024,
		})
		answer <- err
	}()
	time.Sleep(time.Second)
	// Another client, since one sends a call at a time.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := vmm.NewClient(m.api.Socket()).Ping(ctx); err == nil {
		t.Error("the VMM serves a second call at once")
	}
	err := <-answer
	var answered *vmm.Error
	if took := time.Since(start); !errors.As(err, &answered) || took < 50*time.Second || took > stretch(80*time.Second) {
		t.Errorf("vm.add-fs without a listener: %v after %v; want a refusal after a minute", err, took)
	}
	m.do("vm.info afterwards", func(ctx context.Context) error { _, err := m.api.Info(ctx); return err })
}

// TestKilledVMM: what served the guest ends with the VMM, however that ends.
func TestKilledVMM(t *testing.T) {
	need(t)
	m := startVMM(t)
	s := m.share("orphan")
	config := m.config()
	config.FS = []vmm.FSConfig{m.fsConfig("orphan", s, 0)}
	m.do("vm.create", func(ctx context.Context) error { return m.api.Create(ctx, config) })
	m.do("vm.boot", m.api.Boot)
	if !m.has("orphan") {
		t.Error("the device tree lacks a file system of the configuration")
	}
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	m.eventually("virtiofsd ends with the VMM", 5*time.Second, func() bool { return !s.running() })
}
