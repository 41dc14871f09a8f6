package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"spectrum-os.org/broker/vmm"
)

// savedState is what state.json holds: what a clone's QEMU must be started with
// to be able to load memory-ranges.
type savedState struct {
	Standin   string `json:"standin"`
	Kernel    string `json:"kernel"`
	Initramfs string `json:"initramfs,omitempty"`
}

const (
	configFile = "config.json"
	stateFile  = "state.json"
	memoryFile = "memory-ranges"
)

func localDir(url string) (string, error) {
	dir, ok := strings.CutPrefix(url, "file://")
	if !ok || !filepath.IsAbs(dir) {
		return "", internal("Invalid restore source URL")
	}
	return dir, nil
}

// snapshot writes the paused VM into a directory. QEMU cannot save a machine
// that has a vhost-user device, and a paused guest cannot eject one: the guest
// runs on for the instant in which the vsock is taken out.
func (m *machine) snapshot(url string) error {
	const (
		layer = "Cannot snapshot VM"
		what  = "Failed to snapshot migratable component"
	)
	if m.guest == nil {
		return errNotRunning
	}
	m.host.events.say("vm", "snapshotting")
	if m.state != vmm.StatePaused {
		return internal(layer, what, "Trying to snapshot while VM is running")
	}
	dir, err := localDir(url)
	if err != nil {
		return within(err, "Cannot send VM snapshot")
	}
	if len(m.guest.devices.ofKind("fs")) > 0 {
		return internal(layer, what, "the stand-in cannot save a VM with a virtio-fs device")
	}
	if err := m.guest.withoutVsock(func() error { return m.save(dir) }); err != nil {
		return within(err, layer, what)
	}
	m.host.events.say("vm", "snapshotted")
	return nil
}

func (m *machine) save(dir string) error {
	state := savedState{
		Standin:   buildVersion,
		Kernel:    lasting(m.config.Payload.Kernel),
		Initramfs: lasting(m.config.Payload.Initramfs),
	}
	if err := writeJSON(filepath.Join(dir, configFile), m.config); err != nil {
		return err
	}
	if err := writeJSON(filepath.Join(dir, stateFile), state); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, memoryFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return m.guest.saveMemory(f)
}

// lasting turns a path through a descriptor of this process into one that
// another process can open.
func lasting(path string) string {
	if !strings.HasPrefix(path, "/proc/self/fd/") {
		return path
	}
	if target, err := os.Readlink(path); err == nil {
		return target
	}
	return path
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}

// withoutVsock takes the vsock out of the paused guest, calls f, and plugs it
// in again. Its listeners in the guest live on; its connections do not.
func (g *guest) withoutVsock(f func() error) error {
	if err := g.resume(); err != nil {
		return err
	}
	sockets := g.devices.ofKind("vsock")
	if len(sockets) == 0 {
		return errors.Join(g.stop(), f())
	}
	err := g.unplug(sockets[0])
	if err == nil {
		select {
		case <-sockets[0].ejected:
		case <-time.After(20 * time.Second):
			err = errors.New("the guest does not eject its vsock device")
		}
	}
	if stopped := g.stop(); stopped != nil || err != nil {
		return errors.Join(err, stopped)
	}
	g.stopVsock()
	return errors.Join(f(), g.startVsock())
}

// saveMemory writes the machine's memory and devices to the file.
func (g *guest) saveMemory(f *os.File) error {
	if err := g.qmp.giveFile("snapshot", f); err != nil {
		return err
	}
	// The default limit is meant for a network.
	if err := g.qmp.do("migrate-set-parameters", map[string]any{"max-bandwidth": int64(16 << 30)}, nil, nil); err != nil {
		return err
	}
	if err := g.qmp.do("migrate", map[string]any{"uri": "fd:snapshot"}, nil, nil); err != nil {
		return err
	}
	return g.awaitMigration()
}

// awaitMigration waits until memory was written or read.
func (g *guest) awaitMigration() error {
	for {
		var status struct {
			Status    string `json:"status"`
			ErrorDesc string `json:"error-desc"`
		}
		if err := g.qmp.do("query-migrate", nil, nil, &status); err != nil {
			return err
		}
		switch status.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("memory was not transferred: %s", status.ErrorDesc)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// restore makes a VM of a snapshot's directory.
func (m *machine) restore(cfg vmm.RestoreConfig) error {
	if m.guest != nil || m.config != nil {
		return errCreated
	}
	dir, err := localDir(cfg.SourceURL)
	if err != nil {
		return err
	}
	var config vmm.VMConfig
	var state savedState
	if err := errors.Join(readJSON(filepath.Join(dir, configFile), &config), readJSON(filepath.Join(dir, stateFile), &state)); err != nil {
		return internal("Cannot restore VM", err.Error())
	}
	if err := validate(config); err != nil {
		return err
	}
	memory, err := os.Open(filepath.Join(dir, memoryFile))
	if err != nil {
		return internal("Cannot restore VM", err.Error())
	}
	defer memory.Close()
	m.host.events.say("vm", "restoring")
	g, err := m.host.launch(config, bootFiles{kernel: state.Kernel, initramfs: state.Initramfs, incoming: memory})
	if err != nil {
		return within(err, "Cannot restore VM")
	}
	if err = g.awaitMigration(); err == nil {
		err = g.startVsock()
	}
	if err != nil {
		g.close()
		return within(err, "Cannot restore VM")
	}
	m.config = &config
	m.adopt(g, vmm.StatePaused)
	m.host.events.say("vm", "restored")
	if cfg.Resume {
		return m.resume()
	}
	return nil
}

func readJSON(path string, out any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, out)
}
