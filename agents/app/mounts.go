package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sort"
	"sync"
	"time"

	"spectrum-os.org/broker/agents/wire"
)

// Reasons why a mount is not made or removed.
var (
	ErrConflict    = errors.New("that label is mounted from another device")
	ErrNotMounted  = errors.New("nothing is mounted under that label")
	ErrUnderWay    = errors.New("another request for that label is under way")
	ErrTooMany     = errors.New("too many mounts")
	ErrNoDevice    = errors.New("the device did not appear in time")
	ErrInterrupted = errors.New("the request was given up")
)

// maxMounts is more than a VM has device slots for.
const maxMounts = 1024

// Kernel makes and removes mounts. A mount that fails with [ErrNoDevice] is
// tried again when devices change.
type Kernel interface {
	Mount(tag, target string, readOnly bool) error
	// Unmount detaches target, whoever uses it, and removes its directory.
	Unmount(target string) error
	// Gone says that target's device is no longer there. It may block.
	Gone(target string) bool
	// Mounted lists what is mounted beneath wire.MountRoot now.
	Mounted() ([]wire.Mount, error)
}

// Mounts is the table of what the agent has mounted. The zero value is not
// usable; see [NewMounts].
type Mounts struct {
	kernel Kernel
	log    *slog.Logger

	mu      sync.Mutex
	rows    map[string]*row
	changed chan struct{} // closed when devices may have changed
}

// row is one label. While busy, only the request that set it may touch the
// row or the kernel's mount.
type row struct {
	mount    wire.Mount
	busy     bool
	mounted  bool
	checking bool // a liveness check is out
	again    bool // devices went while it was busy or being checked
}

// NewMounts takes over what an earlier agent left mounted.
func NewMounts(k Kernel, log *slog.Logger) (*Mounts, error) {
	m := &Mounts{kernel: k, log: log, rows: map[string]*row{}, changed: make(chan struct{})}
	left, err := k.Mounted()
	if err != nil {
		return nil, fmt.Errorf("cannot list mounts: %w", err)
	}
	for _, mount := range left {
		m.rows[mount.Label] = &row{mount: mount, mounted: true}
	}
	return m, nil
}

// List is what is mounted, by label.
func (m *Mounts) List() []wire.Mount {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := []wire.Mount{}
	for _, r := range m.rows {
		if r.mounted {
			out = append(out, r.mount)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Label < out[j].Label })
	return out
}

// Mount mounts r and returns its path, waiting for the device up to r's
// timeout.
func (m *Mounts) Mount(ctx context.Context, r wire.MountRequest) (string, error) {
	want := wire.Mount{Label: r.Label, Tag: r.Tag, Path: wire.MountPath(r.Label), ReadOnly: r.ReadOnly, File: r.File}
	current, err := m.claim(want)
	if err != nil || current {
		return want.Path, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.Timeout())
	defer cancel()
	err = m.mountWhenThere(ctx, want)
	m.settle(want.Label, err == nil)
	if err != nil {
		return "", err
	}
	m.log.Info("mounted", "label", want.Label, "tag", want.Tag, "read_only", want.ReadOnly)
	return want.Path, nil
}

// claim makes want's row busy, or reports that it is mounted already. A row
// of another device is taken over if that device is gone.
func (m *Mounts) claim(want wire.Mount) (current bool, err error) {
	m.mu.Lock()
	r := m.rows[want.Label]
	switch {
	case r == nil && len(m.rows) >= maxMounts:
		m.mu.Unlock()
		return false, ErrTooMany
	case r == nil:
		m.rows[want.Label] = &row{mount: want, busy: true}
		m.mu.Unlock()
		return false, nil
	case r.busy:
		m.mu.Unlock()
		return false, ErrUnderWay
	}
	r.busy = true
	old := r.mount
	m.mu.Unlock()

	gone := m.kernel.Gone(old.Path)
	if gone {
		err = m.kernel.Unmount(old.Path)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err != nil:
	case gone:
		r.mount, r.mounted = want, false
		return false, nil
	case old == want || (old.Tag == want.Tag && old.ReadOnly == want.ReadOnly):
		r.mount = want
		current = true
	default:
		err = ErrConflict
	}
	m.free(r)
	return current, err
}

// settle ends a claim.
func (m *Mounts) settle(label string, mounted bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !mounted {
		delete(m.rows, label)
		return
	}
	r := m.rows[label]
	r.mounted = true
	m.free(r)
}

// mountWhenThere tries at once, after each change of devices and, should an
// event be lost, now and then.
func (m *Mounts) mountWhenThere(ctx context.Context, want wire.Mount) error {
	for {
		m.mu.Lock()
		changed := m.changed
		m.mu.Unlock()
		err := m.kernel.Mount(want.Tag, want.Path, want.ReadOnly)
		if !errors.Is(err, ErrNoDevice) {
			return err
		}
		select {
		case <-changed:
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ErrInterrupted
			}
			return ErrNoDevice
		}
	}
}

// Unmount removes the mount called label.
func (m *Mounts) Unmount(label string) error {
	m.mu.Lock()
	r := m.rows[label]
	switch {
	case r == nil:
		m.mu.Unlock()
		return ErrNotMounted
	case r.busy:
		m.mu.Unlock()
		return ErrUnderWay
	}
	r.busy = true
	m.mu.Unlock()
	return m.remove(r)
}

// remove takes a busy row's mount away.
func (m *Mounts) remove(r *row) error {
	err := m.kernel.Unmount(r.mount.Path)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.free(r)
		return fmt.Errorf("cannot unmount %s: %w", r.mount.Label, err)
	}
	delete(m.rows, r.mount.Label)
	m.log.Info("unmounted", "label", r.mount.Label)
	return nil
}

// DevicesChanged wakes those who wait for a device and, where some may have gone,
// removes the mounts of those that have. It does not wait for that: a device that
// hangs without going holds one goroutine for its label, and nobody else.
func (m *Mounts) DevicesChanged(someGone bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.changed)
	m.changed = make(chan struct{})
	if !someGone {
		return
	}
	for _, r := range m.rows {
		m.look(r)
	}
}

// look checks a row, at once or, where somebody has it, as soon as they are
// done: an event that is passed over does not come again. m.mu is held.
func (m *Mounts) look(r *row) {
	if r.busy || r.checking {
		r.again = true
		return
	}
	r.again = false
	if r.mounted {
		r.checking = true
		go m.check(r)
	}
}

// free ends a claim on a row that stays. m.mu is held.
func (m *Mounts) free(r *row) {
	r.busy = false
	if r.again {
		m.look(r)
	}
}

func (m *Mounts) check(r *row) {
	gone := m.kernel.Gone(r.mount.Path)
	m.mu.Lock()
	r.checking = false
	if !gone || r.busy || m.rows[r.mount.Label] != r {
		if !gone && r.again && !r.busy {
			m.look(r)
		}
		m.mu.Unlock()
		return
	}
	r.busy = true
	m.mu.Unlock()
	if err := m.remove(r); err != nil {
		m.log.Error("cannot clean up after a device", "label", r.mount.Label, "error", err)
	}
}
