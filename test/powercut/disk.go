package powercut

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	rootID    = 1
	typeMask  = syscall.S_IFMT
	sectorLen = 512
)

// Disk is a file system, mounted or not. All methods may be called at once.
type Disk struct {
	mu     sync.Mutex
	nodes  map[uint64]*node
	lastID uint64

	changes  int // that were asked for
	stopAt   int // the change at which the power goes; 0: never
	off      bool
	gone     chan struct{} // closed when the power is
	released chan struct{} // closed when those who wait for an answer may go

	faults   []*Fault
	room     int64 // bytes that files may still grow by; negative: any
	readOnly bool
	recent   []string // the last changes, for a test that fails
}

// node is a file or a directory.
type node struct {
	id         uint64
	name       string // the last one that it was given
	mode       uint32
	uid, gid   uint32
	links      int
	changed    time.Time
	data       []byte
	names      map[string]uint64 // of a directory
	lasting    lasting
	unsynced   []change
	unsyncedAt bool // the mode was changed
}

// lasting is what of a node is durable.
type lasting struct {
	mode  uint32
	data  []byte
	names map[string]uint64
}

// change is one that was not synced yet.
type change struct {
	kind changeKind
	at   int64 // written: the offset; resized: the size
	data []byte
	name string // linked, unlinked, renamed
	from string // renamed
	id   uint64 // linked, renamed
}

type changeKind int

const (
	written changeKind = iota
	resized
	linked
	unlinked
	renamed
)

// New is an empty disk.
func New() *Disk {
	d := &Disk{nodes: map[uint64]*node{}, room: -1, gone: make(chan struct{}), released: make(chan struct{})}
	d.add(syscall.S_IFDIR|0o755, "/").links = 2
	return d
}

func (d *Disk) add(mode uint32, name string) *node {
	d.lastID++
	n := &node{id: d.lastID, name: name, mode: mode, changed: time.Now(), lasting: lasting{mode: mode}}
	if mode&typeMask == syscall.S_IFDIR {
		n.names, n.lasting.names = map[string]uint64{}, map[string]uint64{}
	}
	d.nodes[n.id] = n
	return n
}

func (n *node) isDir() bool { return n.names != nil }

// scratch files are SQLite's shared index: no database depends on them.
func scratch(name string) bool { return strings.HasSuffix(name, "-shm") }

// do is one operation of a program: of what kind, on which node, by what name.
// It waits for ever, until the cut, where the power is gone.
func (d *Disk) do(op Op, id uint64, name string, run func(n *node, hit *Fault) syscall.Errno) syscall.Errno {
	d.mu.Lock()
	if d.off {
		d.mu.Unlock()
		<-d.released
		return syscall.EIO
	}
	defer d.mu.Unlock()
	n, ok := d.nodes[id]
	if !ok {
		return syscall.ESTALE
	}
	if name == "" {
		name = n.name
	}
	if scratch(name) {
		return run(n, nil)
	}
	if !op.changes() {
		return run(n, d.hit(op, name))
	}
	d.changes++
	d.note(op, name)
	if d.changes == d.stopAt {
		return d.stop()
	}
	return d.change(op, n, name, run)
}

func (d *Disk) change(op Op, n *node, name string, run func(*node, *Fault) syscall.Errno) syscall.Errno {
	if d.readOnly && op != Sync && op != SyncDir { // there is nothing left to sync
		return syscall.EROFS
	}
	f := d.hit(op, name)
	if f == nil || f.Err == 0 || op == Write || op == Sync || op == SyncDir {
		return run(n, f) // which heeds the rest of the fault
	}
	return f.Err
}

// stop turns the power off within an operation, and waits as everybody does.
func (d *Disk) stop() syscall.Errno {
	d.turnOff()
	d.mu.Unlock()
	<-d.released
	d.mu.Lock()
	return syscall.EIO
}

func (d *Disk) turnOff() {
	if !d.off {
		d.off = true
		close(d.gone)
	}
}

const maxRecent = 40

func (d *Disk) note(op Op, name string) {
	if len(d.recent) == maxRecent {
		d.recent = slices.Delete(d.recent, 0, 1)
	}
	d.recent = append(d.recent, fmt.Sprintf("%d %s %s", d.changes, op, name))
}

// Changes is how many operations that change something, or make a change
// durable, there were.
func (d *Disk) Changes() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changes
}

// Recent are the last of them, for a person.
func (d *Disk) Recent() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.recent, "; ")
}

// StopAt turns the power off at the nth change from now on, before it is made.
func (d *Disk) StopAt(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopAt = d.changes + n
}

// PowerOff turns the power off now. Whoever asks for anything waits.
func (d *Disk) PowerOff() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turnOff()
}

// Off is closed when the power is off.
func (d *Disk) Off() <-chan struct{} { return d.gone }

func (d *Disk) write(n *node, at int64, data []byte, f *Fault) (int, syscall.Errno) {
	var errno syscall.Errno
	whole := len(data)
	if f != nil {
		if f.Err != 0 && f.Torn == 0 {
			return 0, f.Err
		}
		data, errno = data[:min(f.Torn, len(data))], f.Err
	}
	if grows := at + int64(len(data)) - int64(len(n.data)); d.room >= 0 && grows > d.room {
		fits := int64(len(data)) - (grows - d.room)
		if fits <= 0 {
			return 0, syscall.ENOSPC
		}
		data, whole = data[:fits], int(fits)
	}
	d.apply(n, change{kind: written, at: at, data: slices.Clone(data)})
	return whole, errno
}

func (d *Disk) resize(n *node, size int64) syscall.Errno {
	if grows := size - int64(len(n.data)); d.room >= 0 && grows > d.room {
		return syscall.ENOSPC
	}
	d.apply(n, change{kind: resized, at: size})
	return 0
}

// apply makes a change of a file's data, not durably.
func (d *Disk) apply(n *node, c change) {
	before := len(n.data)
	n.data = applied(n.data, c)
	if d.room >= 0 {
		d.room -= int64(len(n.data) - before)
	}
	n.unsynced = append(n.unsynced, c)
	n.changed = time.Now()
}

func applied(data []byte, c change) []byte {
	end := c.at
	if c.kind == written {
		end += int64(len(c.data))
	}
	if grow := end - int64(len(data)); grow > 0 {
		data = append(data, make([]byte, grow)...)
	}
	if c.kind == resized {
		// Cut off, so that growing again gives zeros.
		clear(data[c.at:])
		return data[:c.at]
	}
	copy(data[c.at:], c.data)
	return data
}

// sync makes a node durable.
func (n *node) sync(dataOnly bool) {
	for _, c := range n.unsynced {
		if n.isDir() {
			rename(n.lasting.names, c)
		} else {
			n.lasting.data = applied(n.lasting.data, c)
		}
	}
	n.unsynced = nil
	if !dataOnly {
		n.lasting.mode, n.unsyncedAt = n.mode, false
	}
}

// rename makes a change of names.
func rename(names map[string]uint64, c change) {
	switch c.kind {
	case linked:
		names[c.name] = c.id
	case unlinked:
		delete(names, c.name)
	case renamed:
		delete(names, c.from)
		names[c.name] = c.id
	}
}

// named makes a change of a directory's names, not durably.
func (d *Disk) named(dir *node, c change) {
	old := dir.names[c.name]
	rename(dir.names, c)
	if n := d.nodes[old]; n != nil && dir.names[c.name] != old {
		d.drop(n)
	}
	if n := d.nodes[c.id]; n != nil {
		n.name = c.name
		if c.kind == linked {
			n.links++
		}
	}
	dir.unsynced = append(dir.unsynced, c)
	dir.changed = time.Now()
}

// drop takes one name from a node.
func (d *Disk) drop(n *node) {
	if n.links--; n.links == 0 && d.room >= 0 {
		d.room += int64(len(n.data))
	}
}

// find is the node at a path beneath the root; nil: there is none.
func (d *Disk) find(p string) *node {
	n := d.nodes[rootID]
	for _, part := range strings.FieldsFunc(path.Clean("/"+p), func(r rune) bool { return r == '/' }) {
		if n = d.nodes[n.names[part]]; n == nil {
			return nil
		}
	}
	return n
}

// ReadFile is what a program would read from a file now.
func (d *Disk) ReadFile(p string) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.find(p)
	if n == nil || n.isDir() {
		return nil, fmt.Errorf("%s: %w", p, syscall.ENOENT)
	}
	return slices.Clone(n.data), nil
}

// Names are those in a directory, in order.
func (d *Disk) Names(p string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.find(p)
	if n == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(n.names))
}
