package powercut

import (
	"fmt"
	"path"
	"syscall"
)

// Op is what a program asks of a disk.
type Op string

// The operations. Truncate is any change of a size but by writing; SetAttr is
// chmod and chown.
const (
	Open     Op = "open"
	Read     Op = "read"
	Write    Op = "write"
	Truncate Op = "truncate"
	SetAttr  Op = "setattr"
	Sync     Op = "sync"
	SyncDir  Op = "syncdir"
	Create   Op = "create"
	Mkdir    Op = "mkdir"
	Link     Op = "link"
	Unlink   Op = "unlink"
	Rename   Op = "rename"
)

func (o Op) changes() bool { return o != Open && o != Read }

// Fault is one that a disk has, until it is healed.
type Fault struct {
	Op   Op
	Name string // last part of the path, as path.Match; empty: any
	// After is how many such operations go well first, and Times how many fail
	// then; 0: all.
	After, Times int
	// Err is the answer. Where it is zero, the program is told that all is well.
	Err syscall.Errno
	// Torn is how many bytes of a write reach the file.
	Torn int
	// Lost, of a sync: what it was to make durable never will be, although it can
	// still be read, and the next sync succeeds. So do kernels: a page that could
	// not be written counts as clean.
	Lost bool
	// Flip, of a read: one bit of the first byte is not what was written.
	Flip bool

	seen, hits int
}

// Break adds a fault. It may be added again after it was healed.
func (d *Disk) Break(f Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f.seen, f.hits = 0, 0
	d.faults = append(d.faults, &f)
}

// Room leaves that many bytes for files to grow by. What is deleted or cut off
// makes room.
func (d *Disk) Room(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.room = bytes
}

// ReadOnly is what kernels do to a file system that they lost faith in: open
// files stay open, and every change is refused.
func (d *Disk) ReadOnly() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.readOnly = true
}

// Heal ends all faults. What they did stays done.
func (d *Disk) Heal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults, d.room, d.readOnly = nil, -1, false
}

// Hits is how often the present faults struck.
func (d *Disk) Hits() (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.faults {
		n += f.hits
	}
	return n
}

// Flip changes one bit of a byte of a file, at rest.
func (d *Disk) Flip(p string, at int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.find(p)
	if n == nil || at >= len(n.data) {
		return fmt.Errorf("%s has no byte %d", p, at)
	}
	n.data[at] ^= 1
	if at < len(n.lasting.data) {
		n.lasting.data[at] ^= 1
	}
	return nil
}

// hit is the fault that strikes an operation; nil: none.
func (d *Disk) hit(op Op, name string) *Fault {
	var struck *Fault
	for _, f := range d.faults {
		if f.Op != op {
			continue
		}
		if ok, err := path.Match(f.Name, name); f.Name != "" && (!ok || err != nil) {
			continue
		}
		f.seen++
		if f.seen > f.After && (f.Times == 0 || f.hits < f.Times) && struck == nil {
			f.hits++
			struck = f
		}
	}
	return struck
}
