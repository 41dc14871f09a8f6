package main

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// startVsock starts the process behind the hybrid vsock and plugs the device
// in. Cloud Hypervisor has that inside; like there, a socket path that exists
// already is an error, since it may be another VM's.
func (g *guest) startVsock() error {
	cfg := g.config.Vsock
	if cfg.Socket == "" {
		return nil
	}
	const (
		layer = "Error from device manager"
		what  = "Cannot create virtio-vsock backend"
	)
	if _, err := os.Lstat(cfg.Socket); !errors.Is(err, os.ErrNotExist) {
		return internal(layer, what, "Error binding to the host-side Unix socket", "Address in use (os error 98)")
	}
	control := cfg.Socket + ".control"
	if err := os.Remove(control); err != nil && !errors.Is(err, os.ErrNotExist) {
		return internal(layer, what, err.Error())
	}
	var err error
	g.vsock, err = g.host.spawn.start([]string{
		g.host.vsock, fmt.Sprintf("--guest-cid=%d", cfg.CID), "--socket=" + control, "--uds-path=" + cfg.Socket,
	}, nil, g.host.stderr)
	if err != nil {
		return internal(layer, what, err.Error())
	}
	// The name is needed for the connection only: nobody else finds it later.
	defer os.Remove(control)
	if err := g.awaitVsock(control); err != nil {
		g.stopVsock()
		return within(err, layer, what)
	}
	d, err := g.plug("vsock", vsockID(cfg.ID), control, 0, map[string]any{
		"driver": "vhost-user-vsock-pci-non-transitional",
	})
	if err == nil {
		g.gate, err = newGate(cfg.Socket, g.driverRuns(d))
	}
	if err != nil {
		g.stopVsock()
		return within(err, layer, what)
	}
	return nil
}

// awaitVsock waits until the device listens, to QEMU and to the host, or is
// dead.
func (g *guest) awaitVsock(control string) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, toQEMU := os.Lstat(control)
		_, toHost := os.Lstat(g.config.Vsock.Socket)
		if toQEMU == nil && toHost == nil {
			return nil
		}
		select {
		case <-g.vsock.gone:
			return internal("vhost-device-vsock ended", fmt.Sprint(g.vsock.err))
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return internal("vhost-device-vsock does not listen")
		}
	}
}

// stopVsock ends the process and removes its socket.
func (g *guest) stopVsock() {
	if g.vsock == nil {
		return
	}
	if g.gate != nil {
		g.gate.close()
		g.gate = nil
	}
	g.vsock.kill()
	g.vsock = nil
	_ = os.Remove(g.config.Vsock.Socket)
}

// vsockID is the device's id: Cloud Hypervisor makes one up where none is given.
func vsockID(id string) string {
	if id == "" {
		return "_vsock0"
	}
	return id
}
