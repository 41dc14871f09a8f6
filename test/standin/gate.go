package main

import (
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// gate stands in front of the vsock backend's socket until the guest's driver
// has started the device. Cloud Hypervisor's own device answers an early
// connection at its leisure; vhost-device-vsock can be lost to its guest for
// good when one comes before the driver.
type gate struct {
	listener net.Listener
	backend  string
	ready    chan struct{}
	stop     chan struct{}
	once     sync.Once
}

// newGate takes the name of a backend's socket for itself. started tells
// whether the guest's driver runs the device.
func newGate(socket string, started func() (bool, error)) (*gate, error) {
	g := &gate{backend: socket + ".backend", ready: make(chan struct{}), stop: make(chan struct{})}
	if err := os.Rename(socket, g.backend); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	g.listener = l
	go g.watch(started)
	go g.serve()
	return g, nil
}

func (g *gate) watch(started func() (bool, error)) {
	const pause, settle = 50 * time.Millisecond, 500 * time.Millisecond
	for {
		select {
		case <-g.stop:
			return
		case <-time.After(pause):
		}
		if ok, err := started(); ok || err != nil {
			// The driver offers its buffers a moment after it says so.
			time.Sleep(settle)
			// Where nobody can tell, the gate only does harm.
			close(g.ready)
			return
		}
	}
}

func (g *gate) serve() {
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			return
		}
		go g.pass(conn)
	}
}

func (g *gate) pass(conn net.Conn) {
	defer conn.Close()
	select {
	case <-g.ready:
	case <-g.stop:
		return
	}
	backend, err := net.Dial("unix", g.backend)
	if err != nil {
		return
	}
	defer backend.Close()
	var wg sync.WaitGroup
	wg.Go(func() { relay(backend, conn) })
	wg.Go(func() { relay(conn, backend) })
	wg.Wait()
}

// relay copies one way and passes the end on. An end by error ends both ways.
func relay(to, from net.Conn) {
	if _, err := io.Copy(to, from); err != nil {
		_ = to.Close()
		_ = from.Close()
		return
	}
	if w, ok := to.(*net.UnixConn); ok {
		_ = w.CloseWrite()
	}
}

func (g *gate) close() {
	g.once.Do(func() {
		close(g.stop)
		_ = g.listener.Close()
		_ = os.Remove(g.backend)
	})
}

// driverRuns asks QEMU whether the guest's driver has set DRIVER_OK.
func (g *guest) driverRuns(d *device) func() (bool, error) {
	q := g.qmp
	return func() (bool, error) {
		var status struct {
			Status struct {
				Statuses []string `json:"statuses"`
			} `json:"status"`
		}
		err := q.do("x-query-virtio-status", map[string]any{"path": "/machine/peripheral/" + d.qid + "/virtio-backend"}, nil, &status)
		if err != nil {
			return false, err
		}
		for _, s := range status.Status.Statuses {
			if strings.Contains(s, "DRIVER_OK") {
				return true, nil
			}
		}
		return false, nil
	}
}
