package main

import (
	"fmt"
	"sync"

	"spectrum-os.org/broker/vmm"
)

// slotsPerSegment is what one segment holds: 32 device numbers, of which the
// segment's own host bridge has the first.
const slotsPerSegment = 31

// maxSegments is how many segments the emulated machine can carry: each is a
// bridge that takes one of sixteen windows of I/O ports.
const maxSegments = 10

// device is something on the guest's bus, from its adding until its ejection.
type device struct {
	id      string
	kind    string // "fs", "vsock", "disk", "rng", "console"
	segment int
	slot    int
	// qid is the device's name in QEMU, where ids may not hold every character.
	qid string
	// backend is the chardev or block node to remove when the device is gone.
	backend string
	// ejected is closed when the guest has let go and the backend is closed.
	ejected chan struct{}
}

// bdf is the address as Cloud Hypervisor spells it. The guest sees bridges
// instead of segments, and so another address.
func (d *device) bdf() string { return fmt.Sprintf("%04x:00:%02x.0", d.segment, d.slot) }

// removable says whether vm.remove-device serves the device's kind.
func (d *device) removable() bool { return d.kind == "fs" || d.kind == "vsock" || d.kind == "disk" }

// devices is the device tree. It has a lock of its own, because the guest
// ejects whenever it likes, also while a call is being served.
type devices struct {
	mu       sync.Mutex
	segments int
	byID     map[string]*device
	next     int
}

func newDevices(segments int) *devices {
	return &devices{segments: max(segments, 1), byID: map[string]*device{}}
}

// add reserves the lowest free slot of the segment.
func (t *devices) add(id, kind string, segment int) (*device, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, taken := t.byID[id]; taken {
		// Still being ejected: gone from the configuration, not from the bus.
		return nil, internal("Error from device manager", "Invalid identifier as it is not unique: "+id)
	}
	used := map[int]bool{}
	for _, d := range t.byID {
		if d.segment == segment {
			used[d.slot] = true
		}
	}
	for slot := 1; slot <= slotsPerSegment; slot++ {
		if used[slot] {
			continue
		}
		t.next++
		d := &device{
			id: id, kind: kind, segment: segment, slot: slot,
			qid: fmt.Sprintf("d%d", t.next), backend: fmt.Sprintf("b%d", t.next),
			ejected: make(chan struct{}),
		}
		t.byID[id] = d
		return d, nil
	}
	return nil, errNoSlot()
}

// drop forgets a device that never came to be, or is gone.
func (t *devices) drop(d *device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, d.id)
}

func (t *devices) get(id string) *device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id]
}

func (t *devices) byQID(qid string) *device {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.byID {
		if d.qid == qid {
			return d
		}
	}
	return nil
}

// ofKind lists the devices of one kind.
func (t *devices) ofKind(kind string) []*device {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*device
	for _, d := range t.byID {
		if d.kind == kind {
			list = append(list, d)
		}
	}
	return list
}

// tree is what vm.info shows: a PCI node for each device and the device below
// it.
func (t *devices) tree() map[string]vmm.DeviceNode {
	t.mu.Lock()
	defer t.mu.Unlock()
	tree := map[string]vmm.DeviceNode{
		"__serial": {ID: "__serial"},
	}
	for id, d := range t.byID {
		pci := "_virtio-pci-" + id
		tree[pci] = vmm.DeviceNode{ID: pci, Children: []string{id}, PCIBDF: d.bdf()}
		tree[id] = vmm.DeviceNode{ID: id, Parent: pci}
	}
	return tree
}
