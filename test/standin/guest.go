package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"spectrum-os.org/broker/vmm"
)

// ending says why a guest stopped running by itself.
type ending string

const (
	endShutdown ending = "shutdown" // it powered off
	endReset    ending = "reset"    // it asked for a reboot, or panicked into one
	endCrash    ending = "crash"    // QEMU died
)

// guest is one run of QEMU, with the processes that serve its devices.
type guest struct {
	host    *host
	config  vmm.VMConfig
	devices *devices
	qemu    *child
	qmp     *qmp
	vsock   *child
	gate    *gate
	ended   chan ending // one value, when the guest stops by itself
	endOnce sync.Once
	work    chan func() // commands that events lead to; see onEvent
	log     *slog.Logger

	// frozen: QEMU got SIGSTOP, and we hold its monitor's turn. Only calls
	// change it, which have their turns.
	frozen bool
	// leaving are the devices to unplug once the guest runs again.
	leaving []*device
	// terminals are the pseudo-terminals that the consoles got.
	terminals terminals
}

// host is what a guest needs of the process around it.
type host struct {
	spawn  *spawner
	events *monitor
	qemu   string
	vsock  string
	stderr *os.File
	log    *slog.Logger
	// fsWait is how long a vhost-user socket that nobody listens on is retried.
	fsWait   time.Duration
	stopping chan struct{} // closed when the process was told to end
}

// bootFiles are the files that QEMU is started with.
type bootFiles struct {
	kernel, initramfs string
	incoming          *os.File // a saved machine to load, or nil
}

// launch starts QEMU, stopped. The caller resumes or closes it.
func (h *host) launch(config vmm.VMConfig, boot bootFiles) (*guest, error) {
	g := &guest{
		host: h, config: config, log: h.log,
		devices: newDevices(config.Platform.NumPCISegments),
		ended:   make(chan ending, 1),
		work:    make(chan func(), 4096),
	}
	cmd, err := g.command(boot)
	defer cmd.close()
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, internal(err.Error())
	}
	defer theirs.Close()
	cmd.add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", cmd.pass(theirs)), "-mon", "chardev=qmp,mode=control")
	h.log.Debug("starting QEMU", "argv", cmd.argv)
	if g.qemu, err = h.spawn.start(cmd.argv, cmd.files, h.stderr); err != nil {
		ours.Close()
		return nil, internal(err.Error())
	}
	g.qmp = newQMP(ours, g.onEvent)
	go g.watch()
	if err := g.qmp.do("qmp_capabilities", nil, nil, nil); err != nil {
		g.close()
		return nil, internal("QEMU did not start", err.Error())
	}
	g.terminals = g.findTerminals()
	return g, nil
}

// watch runs what events ask for, until QEMU is gone.
func (g *guest) watch() {
	for {
		select {
		case f := <-g.work:
			f()
		case <-g.qmp.closed:
			g.end(endCrash)
			return
		}
	}
}

func (g *guest) end(why ending) { g.endOnce.Do(func() { g.ended <- why }) }

// onEvent runs on the monitor's reader: what needs a command goes to watch.
func (g *guest) onEvent(e qmpEvent) {
	switch e.Event {
	case "SHUTDOWN":
		var data struct{ Reason string }
		if json.Unmarshal(e.Data, &data) != nil {
			return
		}
		switch data.Reason {
		case "guest-shutdown":
			g.end(endShutdown)
		case "guest-reset", "guest-panic":
			g.end(endReset)
		}
	case "DEVICE_DELETED":
		var data struct{ Device string }
		if json.Unmarshal(e.Data, &data) != nil || data.Device == "" {
			return
		}
		if d := g.devices.byQID(data.Device); d != nil {
			g.work <- func() { g.eject(d) }
		}
	}
}

// eject closes the backend of a device that the guest let go. QEMU would keep
// the connection, and so virtiofsd alive.
func (g *guest) eject(d *device) {
	if err := g.removeBackend(d); err != nil {
		g.log.Warn("cannot remove a backend", "device", d.id, "error", err)
	}
	g.devices.drop(d)
	close(d.ejected)
	g.host.events.say("vm", "device-removed", "id", d.id, "bdf", d.bdf())
}

func (g *guest) removeBackend(d *device) error {
	switch d.kind {
	case "disk":
		return g.qmp.do("blockdev-del", map[string]any{"node-name": d.backend}, nil, nil)
	case "fs", "vsock":
		return g.qmp.do("chardev-remove", map[string]any{"id": d.backend}, nil, nil)
	}
	return nil
}

// plug adds a vhost-user device whose backend listens on the socket. It waits
// for the listener as Cloud Hypervisor does, and connects before it looks for
// a slot, so that a backend sees a connection even when the segment is full.
func (g *guest) plug(kind, id, socket string, segment int, properties map[string]any) (*device, error) {
	conn, err := g.host.connect(socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	d, err := g.devices.add(id, kind, segment)
	if err != nil {
		return nil, err
	}
	if err := g.plugConnected(d, conn, properties); err != nil {
		g.devices.drop(d)
		return nil, internal("Error from device manager", err.Error())
	}
	return d, nil
}

func (g *guest) plugConnected(d *device, conn *os.File, properties map[string]any) error {
	if err := g.qmp.giveFile(d.backend, conn); err != nil {
		return err
	}
	backend := map[string]any{"type": "socket", "data": map[string]any{
		"server": false,
		"addr":   map[string]any{"type": "fd", "data": map[string]any{"str": d.backend}},
	}}
	if err := g.qmp.do("chardev-add", map[string]any{"id": d.backend, "backend": backend}, nil, nil); err != nil {
		return err
	}
	properties["id"] = d.qid
	properties["chardev"] = d.backend
	properties["bus"] = segmentBus(d.segment)
	properties["addr"] = fmt.Sprintf("0x%x", d.slot)
	if err := g.qmp.do("device_add", properties, nil, nil); err != nil {
		return errors.Join(err, g.removeBackend(d))
	}
	return nil
}

func (g *guest) plugFS(fs vmm.FSConfig) (*device, error) {
	return g.plug("fs", fs.ID, fs.Socket, fs.PCISegment, map[string]any{
		"driver": "vhost-user-fs-pci", "tag": fs.Tag, "queue-size": fs.QueueSize,
	})
}

// connect dials a vhost-user backend, retrying while nobody listens.
func (h *host) connect(socket string) (*os.File, error) {
	deadline := time.Now().Add(h.fsWait)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			defer conn.Close()
			return conn.(*net.UnixConn).File()
		}
		if time.Now().After(deadline) {
			return nil, internal("Error from device manager", "Cannot create virtio-fs device",
				"Timed out waiting for vhost-user connection")
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-h.stopping:
			return nil, internal("Error from device manager", "Cannot create virtio-fs device",
				"Connection to vhost-user socket was interrupted")
		}
	}
}

// unplug asks the guest to let go, and does not wait for it.
func (g *guest) unplug(d *device) error {
	if g.frozen {
		g.leaving = append(g.leaving, d)
		return nil
	}
	err := g.qmp.do("device_del", map[string]any{"id": d.qid}, nil, nil)
	var refused *qmpError
	if errors.As(err, &refused) &&
		(refused.class == "DeviceNotFound" || strings.Contains(refused.desc, "in the process of unplug")) {
		return nil // asked before; the answer was the same
	}
	return err
}

// resume lets the guest run, whichever way it was stopped.
func (g *guest) resume() error {
	if !g.frozen {
		return g.qmp.do("cont", nil, nil, nil)
	}
	if err := g.thaw(); err != nil {
		return err
	}
	leaving := g.leaving
	g.leaving = nil
	for _, d := range leaving {
		if err := g.unplug(d); err != nil {
			return err
		}
	}
	return nil
}

// stop stops the guest by way of QEMU, which stops its vhost-user devices too.
func (g *guest) stop() error { return g.qmp.do("stop", nil, nil, nil) }

// freeze stops the guest without stopping its devices: QEMU as a whole stands
// still. QEMU's own way races with the guest's last request to a vhost-user
// backend; the backends built on rust-vmm, when they lose, serve no more.
func (g *guest) freeze() error {
	g.qmp.turn.Lock()
	if err := g.qemu.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		g.qmp.turn.Unlock()
		return err
	}
	g.frozen = true
	return nil
}

func (g *guest) thaw() error {
	if err := g.qemu.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		return err
	}
	g.frozen = false
	g.qmp.turn.Unlock()
	return nil
}

// thawed calls f while QEMU can answer. A frozen guest runs for that long.
func (g *guest) thawed(f func() error) error {
	if !g.frozen {
		return f()
	}
	if err := g.thaw(); err != nil {
		return err
	}
	return errors.Join(f(), g.freeze())
}

// close kills QEMU and what serves it. When it returns every vhost-user
// connection is closed, and the sockets are gone.
func (g *guest) close() {
	g.qemu.kill()
	if g.frozen {
		g.frozen = false
		g.qmp.turn.Unlock()
	}
	g.stopVsock()
	for _, console := range []vmm.ConsoleConfig{g.config.Serial, g.config.Console} {
		if console.Mode == vmm.ConsoleSocket {
			_ = os.Remove(console.Socket)
		}
	}
	g.end(endCrash)
}

// socketPair returns our end as a connection and the other as a file.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours := os.NewFile(uintptr(fds[0]), "qmp")
	theirs := os.NewFile(uintptr(fds[1]), "qmp")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}
