package main

import (
	"os"
	"sync"
	"syscall"
	"time"

	"spectrum-os.org/broker/vmm"
)

// monitor writes the event stream. A write that fails, or would block, is
// dropped, as Cloud Hypervisor does: a slow reader must not stop the VMM.
type monitor struct {
	mu    sync.Mutex
	start time.Time
	file  *os.File // nil: nobody asked for events
}

// openMonitor opens the file that the option names. A FIFO is waited for until
// somebody reads it.
func openMonitor(e endpoint) (*monitor, error) {
	m := &monitor{start: time.Now()}
	switch {
	case e.fd >= 0:
		if err := syscall.SetNonblock(e.fd, true); err != nil {
			return nil, err
		}
		m.file = os.NewFile(uintptr(e.fd), "event-monitor")
	case e.path != "":
		f, err := os.OpenFile(e.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
		if err != nil {
			return nil, err
		}
		m.file = f
	}
	return m, nil
}

// say writes one event; properties are key, value, key, value …
func (m *monitor) say(source, event string, properties ...string) {
	if m.file == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := vmm.Event{
		Since:     time.Since(m.start),
		EventName: vmm.EventName{Source: source, Event: event},
	}
	for i := 0; i+1 < len(properties); i += 2 {
		if e.Properties == nil {
			e.Properties = map[string]string{}
		}
		e.Properties[properties[i]] = properties[i+1]
	}
	text, err := e.MarshalText()
	if err != nil {
		return
	}
	// One write, so that a reader of a pipe never sees half an event for long.
	// The deadline holds for pipes; a plain file never blocks and refuses it.
	_ = m.file.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	_, _ = m.file.Write(append(text, "\n\n"...))
}
