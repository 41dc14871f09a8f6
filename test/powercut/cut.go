package powercut

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// Loss says what a power cut takes of that which was not synced.
type Loss int

const (
	// LoseAll takes all of it.
	LoseAll Loss = iota
	// LoseTail leaves of each file and directory the first changes, and tears
	// the last of them at any byte.
	LoseTail
	// LoseAny leaves of each file any of the sectors that were written, in
	// whatever order they were, and of each directory the first changes.
	LoseAny
	// LoseNothing takes none: the kernel had written it all by itself.
	LoseNothing
)

// Losses are all of them.
var Losses = []Loss{LoseAll, LoseTail, LoseAny, LoseNothing}

func (l Loss) String() string {
	return [...]string{"all is lost", "the tail is lost", "any sectors are lost", "nothing is lost"}[l]
}

// Cut is the disk as it is found after a power cut at this moment. It has no
// faults. The disk itself stays as it is, so that more than one outcome can be
// looked at. The same choices give the same outcome.
func (d *Disk) Cut(r *rand.Rand, loss Loss) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	after := New()
	after.lastID = d.lastID
	// In order, so that the same choices fall on the same nodes.
	for _, id := range slices.Sorted(maps.Keys(d.nodes)) {
		n := d.nodes[id]
		survived := &node{id: id, name: n.name, mode: n.lasting.mode, uid: n.uid, gid: n.gid, changed: n.changed}
		if n.unsyncedAt && loss != LoseAll && (loss == LoseNothing || r.IntN(2) == 0) {
			survived.mode = n.mode
		}
		if n.isDir() {
			survived.names = maps.Clone(n.lasting.names)
			for _, c := range first(r, loss, n.unsynced) {
				rename(survived.names, c)
			}
		} else if !scratch(n.name) {
			survived.data = n.left(r, loss)
		}
		after.nodes[id] = survived
	}
	after.nodes[rootID].links = 2
	after.keepNamed()
	return after
}

// first are the changes that survive, where changes survive in order.
func first(r *rand.Rand, loss Loss, changes []change) []change {
	switch loss {
	case LoseAll:
		return nil
	case LoseNothing:
		return changes
	}
	return changes[:r.IntN(len(changes)+1)]
}

// left is what is left of a file's data.
func (n *node) left(r *rand.Rand, loss Loss) []byte {
	data := slices.Clone(n.lasting.data)
	if loss != LoseAny {
		survived := first(r, loss, n.unsynced)
		for i, c := range survived {
			if loss == LoseTail && i == len(survived)-1 && c.kind == written {
				c.data = c.data[:r.IntN(len(c.data)+1)]
			}
			data = applied(data, c)
		}
		return data
	}
	for _, c := range n.unsynced {
		if c.kind == resized {
			if r.IntN(2) == 0 {
				data = applied(data, c)
			}
			continue
		}
		for from := int64(0); from < int64(len(c.data)); {
			at := c.at + from
			to := min(from+sectorLen-at%sectorLen, int64(len(c.data)))
			if r.IntN(2) == 0 {
				data = applied(data, change{kind: written, at: at, data: c.data[from:to]})
			}
			from = to
		}
	}
	return data
}

// keepNamed drops what has no name, and makes what is left durable.
func (d *Disk) keepNamed() {
	kept := map[uint64]*node{rootID: d.nodes[rootID]}
	for queue := []*node{d.nodes[rootID]}; len(queue) > 0; queue = queue[1:] {
		dir := queue[0]
		for name, id := range dir.names {
			n := d.nodes[id]
			n.links++
			n.name = name
			if kept[id] == nil {
				kept[id] = n
				if n.isDir() {
					n.links++
					queue = append(queue, n)
				}
			}
		}
	}
	d.nodes = kept
	for _, n := range kept {
		n.lasting = lasting{mode: n.mode, data: slices.Clone(n.data), names: maps.Clone(n.names)}
	}
}

// Export copies what is on the disk into a directory of another file system,
// where it can be looked at without a mount. Scratch is left out.
func (d *Disk) Export(to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.export(d.nodes[rootID], to)
}

func (d *Disk) export(dir *node, to string) error {
	for name, id := range dir.names {
		n, at := d.nodes[id], filepath.Join(to, name)
		var err error
		switch {
		case scratch(name):
		case n.isDir():
			if err = os.MkdirAll(at, 0o700); err == nil {
				err = d.export(n, at)
			}
		default:
			err = os.WriteFile(at, n.data, 0o600)
		}
		if err == nil && !scratch(name) {
			err = os.Chmod(at, os.FileMode(n.mode&0o777))
		}
		if err != nil {
			return fmt.Errorf("cannot copy what is on the disk: %w", err)
		}
	}
	return nil
}

// Import puts the files of a directory on the disk, durably.
func (d *Disk) Import(from string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.imports(d.nodes[rootID], from)
}

func (d *Disk) imports(dir *node, from string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return err
		}
		mode, at := uint32(info.Mode().Perm()), filepath.Join(from, e.Name())
		var n *node
		switch {
		case info.IsDir():
			n = d.add(syscall.S_IFDIR|mode, e.Name())
			n.links = 1
			err = d.imports(n, at)
		case info.Mode().IsRegular():
			n = d.add(syscall.S_IFREG|mode, e.Name())
			n.data, err = os.ReadFile(at)
			n.lasting.data = slices.Clone(n.data)
		default:
			return fmt.Errorf("%s is neither a file nor a directory", at)
		}
		if err != nil {
			return err
		}
		d.named(dir, change{kind: linked, name: e.Name(), id: n.id})
	}
	dir.sync(false)
	return nil
}
