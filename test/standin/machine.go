package main

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"

	"spectrum-os.org/broker/vmm"
)

// machine is the one VM. Every call, and every ending of a guest, has its turn
// alone: that is how Cloud Hypervisor comes to block its whole API.
type machine struct {
	host *host
	log  *slog.Logger
	turn sync.Mutex

	config *vmm.VMConfig // nil: no VM was created
	state  vmm.State
	guest  *guest // nil: nothing runs

	noShutdown bool
	exit       chan int // the process's exit code; the first one counts
}

func newMachine(h *host, noShutdown bool) *machine {
	return &machine{host: h, log: h.log, state: vmm.StateCreated, noShutdown: noShutdown, exit: make(chan int, 1)}
}

// quit makes the process exit. The first code counts.
func (m *machine) quit(code int) {
	select {
	case m.exit <- code:
	default:
	}
}

func (m *machine) create(cfg vmm.VMConfig) error {
	if m.config != nil {
		return errCreated
	}
	if cfg.Payload.Kernel == "" {
		return errInvalid("No kernel or firmware provided")
	}
	if err := validate(cfg); err != nil {
		return err
	}
	m.config, m.state = &cfg, vmm.StateCreated
	return nil
}

// validate checks what Cloud Hypervisor checks of a configuration, as far as
// the stand-in can carry it out.
func validate(cfg vmm.VMConfig) error {
	if n := cfg.Platform.NumPCISegments; n < 0 || n > maxSegments {
		return errInvalid(fmt.Sprintf("Number of PCI segments (%d) not in range of 1 to %d", n, maxSegments))
	}
	segments := max(cfg.Platform.NumPCISegments, 1)
	ids := map[string]bool{}
	check := func(id string, segment int) error {
		if segment < 0 || segment >= segments {
			return errInvalid(fmt.Sprintf("Invalid PCI segment id: %d", segment))
		}
		switch {
		case id == "":
			return nil
		case strings.HasPrefix(id, "__"):
			return errInvalid("Identifier " + id + " is not invalid")
		case ids[id]:
			return errNotUnique(id)
		}
		ids[id] = true
		return nil
	}
	for _, fs := range cfg.FS {
		if len(fs.Tag) > 36 {
			return errInvalid("max tag length is 36")
		}
		if !cfg.Memory.Shared {
			return errInvalid("Using vhost-user requires using shared memory or huge pages")
		}
		if err := check(fs.ID, fs.PCISegment); err != nil {
			return err
		}
	}
	for _, disk := range cfg.Disks {
		if err := check(disk.ID, disk.PCISegment); err != nil {
			return err
		}
	}
	if cfg.Vsock.Socket != "" {
		if cfg.Vsock.CID < 3 {
			return errInvalid(fmt.Sprintf("%d is not a valid VSOCK CID", cfg.Vsock.CID))
		}
		return check(cfg.Vsock.ID, 0)
	}
	return nil
}

func (m *machine) boot() error {
	if m.guest != nil {
		return errCreated
	}
	m.host.events.say("vm", "booting")
	if m.config == nil {
		return errNoConfig
	}
	if err := m.start(); err != nil {
		return err
	}
	m.host.events.say("vm", "booted")
	return nil
}

// start runs a fresh guest of the configuration, with every file system that
// it lists: after a reboot too, when their backends may be gone.
func (m *machine) start() error {
	g, err := m.host.launch(*m.config, bootFiles{
		kernel: m.config.Payload.Kernel, initramfs: m.config.Payload.Initramfs,
	})
	if err != nil {
		return err
	}
	err = g.startVsock()
	for i := 0; err == nil && i < len(m.config.FS); i++ {
		_, err = g.plugFS(m.config.FS[i])
	}
	if err == nil {
		err = g.resume()
	}
	if err != nil {
		g.close()
		return within(err)
	}
	m.adopt(g, vmm.StateRunning)
	return nil
}

// adopt makes g the machine's guest, and waits for its end.
func (m *machine) adopt(g *guest, state vmm.State) {
	m.guest, m.state = g, state
	go func() {
		why := <-g.ended
		m.turn.Lock()
		defer m.turn.Unlock()
		if m.guest != g {
			return // ended by a call
		}
		m.guestEnded(why)
	}()
}

// guestEnded acts on a guest that stopped by itself.
func (m *machine) guestEnded(why ending) {
	m.log.Info("guest ended", "why", string(why))
	switch why {
	case endReset:
		if err := m.reboot(); err != nil {
			m.log.Error("cannot reboot the VM", "error", err)
			m.quit(1)
		}
	case endShutdown:
		if m.noShutdown {
			_ = m.shutdown()
			return
		}
		m.shutdownVMM()
	case endCrash:
		m.log.Error("QEMU is gone")
		m.drop()
		m.quit(1)
	}
}

func (m *machine) drop() {
	if m.guest != nil {
		g := m.guest
		m.guest, m.state = nil, vmm.StateCreated
		g.close()
	}
}

func (m *machine) shutdown() error {
	if m.guest == nil {
		return errNotRunning
	}
	m.drop()
	m.host.events.say("vm", "shutdown")
	return nil
}

func (m *machine) reboot() error {
	m.host.events.say("vm", "rebooting")
	if m.guest == nil {
		return errNotCreated
	}
	m.drop()
	if err := m.start(); err != nil {
		return err
	}
	m.host.events.say("vm", "rebooted")
	return nil
}

func (m *machine) delete() error {
	if m.config == nil {
		return nil
	}
	if m.guest != nil {
		_ = m.shutdown()
	}
	m.config = nil
	m.host.events.say("vm", "deleted")
	return nil
}

func (m *machine) shutdownVMM() {
	_ = m.delete()
	m.host.events.say("vmm", "shutdown")
	m.quit(0)
}

func (m *machine) pause() error {
	if m.guest == nil {
		return errNotRunning
	}
	m.host.events.say("vm", "pausing")
	if m.state != vmm.StateRunning {
		return internal("Cannot pause VM", "Failed to pause migratable component",
			fmt.Sprintf("Invalid transition: InvalidStateTransition(%s, Paused)", m.state))
	}
	if err := m.guest.freeze(); err != nil {
		return internal("Cannot pause VM", err.Error())
	}
	m.state = vmm.StatePaused
	m.host.events.say("vm", "paused")
	return nil
}

func (m *machine) resume() error {
	if m.guest == nil {
		return errNotRunning
	}
	m.host.events.say("vm", "resuming")
	if m.state != vmm.StatePaused {
		return internal("Cannot resume VM", "Failed to resume migratable component",
			fmt.Sprintf("Invalid transition: InvalidStateTransition(%s, Running)", m.state))
	}
	if err := m.guest.resume(); err != nil {
		return internal("Cannot resume VM", err.Error())
	}
	m.state = vmm.StateRunning
	m.host.events.say("vm", "resumed")
	return nil
}

func (m *machine) powerButton() error {
	if m.guest == nil {
		return errNotRunning
	}
	return m.guest.thawed(func() error { return m.guest.qmp.do("system_powerdown", nil, nil, nil) })
}

// addFS returns what was added, or nil where the VM does not run yet.
func (m *machine) addFS(fs vmm.FSConfig) (*vmm.DeviceInfo, error) {
	if m.config == nil {
		return nil, errNotCreated
	}
	if fs.ID == "" {
		fs.ID = m.freeID("_fs")
	}
	next := *m.config
	next.FS = append(slices.Clone(m.config.FS), fs)
	if err := validate(next); err != nil {
		return nil, err
	}
	if m.guest == nil {
		m.config = &next
		return nil, nil
	}
	var d *device
	err := m.guest.thawed(func() (err error) {
		d, err = m.guest.plugFS(fs)
		return err
	})
	if err != nil {
		return nil, err
	}
	m.config = &next
	return &vmm.DeviceInfo{ID: d.id, BDF: d.bdf()}, nil
}

// freeID makes up an identifier as Cloud Hypervisor does: a prefix and the
// first number that is free.
func (m *machine) freeID(prefix string) string {
	for n := 0; ; n++ {
		id := fmt.Sprint(prefix, n)
		if slices.ContainsFunc(m.config.FS, func(f vmm.FSConfig) bool { return f.ID == id }) {
			continue
		}
		if m.guest != nil && m.guest.devices.get(id) != nil {
			continue
		}
		return id
	}
}

func (m *machine) removeDevice(id string) error {
	if m.config == nil {
		return errNotCreated
	}
	if m.guest == nil {
		if !m.forget(id) {
			return fail(404, fmt.Sprintf("No device with id %q to remove", id))
		}
		return nil
	}
	d := m.guest.devices.get(id)
	if d == nil {
		return errUnknownDevice(id)
	}
	if !d.removable() {
		return internal("Error from device manager", "Not allowed to remove this type of device from the VM: "+d.kind)
	}
	m.forget(id)
	if err := m.guest.unplug(d); err != nil {
		return internal("Error from device manager", err.Error())
	}
	return nil
}

// forget takes a device out of the configuration: at once, also when the guest
// never ejects it.
func (m *machine) forget(id string) bool {
	next := *m.config
	next.FS = slices.DeleteFunc(slices.Clone(next.FS), func(f vmm.FSConfig) bool { return f.ID == id })
	next.Disks = slices.DeleteFunc(slices.Clone(next.Disks), func(d vmm.DiskConfig) bool { return d.ID == id })
	known := len(next.FS) != len(m.config.FS) || len(next.Disks) != len(m.config.Disks)
	m.config = &next
	return known
}

func (m *machine) info() (vmm.Info, error) {
	if m.config == nil {
		return vmm.Info{}, errNotCreated
	}
	info := vmm.Info{Config: *m.config, State: m.state, MemoryActualSize: m.config.Memory.Size}
	if m.guest != nil {
		info.DeviceTree = m.guest.devices.tree()
		m.guest.terminals.name(&info.Config)
	}
	return info, nil
}

func (m *machine) ping() vmm.PingInfo {
	return vmm.PingInfo{Version: version, BuildVersion: buildVersion, PID: int64(os.Getpid()), Features: []string{"standin"}}
}
