package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/vmm/shim"
)

// slotsPerSegment is how many shares each PCI segment holds.
const slotsPerSegment = 29

// manyFiles are directories d0, d1 … with a file each.
func manyFiles(n int) map[string]string {
	files := map[string]string{}
	for i := range n {
		files[fmt.Sprintf("d%d/f", i)] = fmt.Sprintf("file %d\n", i)
	}
	return files
}

// TestManyGrantsAtOnce attaches 100 shares to one VM.
func TestManyGrantsAtOnce(t *testing.T) {
	const many, width = 100, 8
	w := newWorld(t)
	p := w.partition(manyFiles(many))
	// Each share takes three interrupt vectors of the guest, and one CPU has
	// about 200.
	vm := w.vm(p, "greedy", "memory_mib = 384\nvcpus = 2\n")
	w.start()
	g := w.boot(vm)[0]
	free := w.show(vm).SlotsFree
	if free < many {
		t.Fatalf("a VM has only %d slots by default", free)
	}

	began := time.Now()
	next := make(chan int)
	var wg sync.WaitGroup
	for range width {
		wg.Go(func() {
			for i := range next {
				label := "d" + strconv.Itoa(i)
				got, err := w.tryGrant(vm, fs("ro", p, "/"+label), label)
				if err != nil || got.State != api.GrantActive || got.Observed.State != "attached" || got.MountPath == "" {
					t.Errorf("%s: %s, %s, at %q (%s), %v", label, got.State, got.Observed.State, got.MountPath, got.Reason, err)
				}
			}
		})
	}
	for i := range many {
		next <- i
	}
	close(next)
	wg.Wait()
	t.Logf("%d grants in %v", many, time.Since(began).Round(10*time.Millisecond))
	if t.Failed() {
		return
	}
	out, status := g.sh(fmt.Sprintf("for i in $(seq 0 %d); do cat /run/spectrum/fs/d$i/f || echo no $i; done", many-1))
	var want []string
	for i := range many {
		want = append(want, fmt.Sprintf("file %d", i))
	}
	if status != 0 || out != strings.Join(want, "\n") {
		t.Errorf("the guest reads, status %d:\n%s", status, out)
	}
	if v := w.show(vm); v.SlotsFree != free-many || v.Grants != many {
		t.Errorf("%d slots free and %d grants, want %d and %d", v.SlotsFree, v.Grants, free-many, many)
	}

	began = time.Now()
	// In groups: an emulated guest takes a third of a second to eject one
	// device, and an honest one that is not done with all it is asked for after
	// five cut deadlines is cut off.
	live, err := w.Client.ListGrants(w.ctx(20*time.Second), api.GrantFilter{VM: vm.String()})
	w.must(err)
	revoked := 0
	for len(live) > 0 {
		var ids []uuid.UUID
		for _, g := range live[:min(16, len(live))] {
			ids = append(ids, g.ID)
		}
		live = live[len(ids):]
		revoked += len(w.revoke(ids...).Revoked)
	}
	t.Logf("%d revoked in %v", revoked, time.Since(began).Round(10*time.Millisecond))
	if degraded := w.show(vm).Degraded; revoked != many || len(degraded) > 0 {
		t.Errorf("%d revoked, want %d; degraded: %v", revoked, many, degraded)
	}
	w.emptyAgain(vm, free)
}

// TestNoSlots fills a VM of one segment, and one that may hold few grants.
func TestNoSlots(t *testing.T) {
	w := newWorld(t)
	w.BrokerArgs = []string{"--pci-segments", "1"}
	p := w.partition(manyFiles(slotsPerSegment + 2))
	vm := w.vm(p, "full", smallVM)
	w.start()
	g := w.boot(vm)[0]
	if free := w.show(vm).SlotsFree; free != slotsPerSegment {
		t.Fatalf("%d slots free, want %d", free, slotsPerSegment)
	}
	var ids []uuid.UUID
	var mu sync.Mutex
	var wg sync.WaitGroup
	for lane := range 4 {
		wg.Go(func() {
			for i := lane; i < slotsPerSegment; i += 4 {
				got, err := w.tryGrant(vm, fs("ro", p, fmt.Sprintf("/d%d", i)), fmt.Sprintf("d%d", i))
				if err != nil || got.State != api.GrantActive {
					t.Errorf("grant %d: %s, %v", i, got.State, err)
				}
				mu.Lock()
				ids = append(ids, got.ID)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	over := func(words string) {
		t.Helper()
		_, err := w.tryGrant(vm, fs("ro", p, "/d30"), "over")
		if api.CodeOf(err) != api.CodeNoSlots || !strings.Contains(err.Error(), words) {
			t.Errorf("one grant too many: %v, want %s and %q", err, api.CodeNoSlots, words)
		}
	}
	over("no free slot")
	// The refusal harms nothing, and a slot that is given back is used again.
	if err := g.reads("d0", "file 0"); err != nil {
		t.Error(err)
	}
	w.revoke(ids[0])
	w.eventually(5*time.Second, func() error {
		if free := w.show(vm).SlotsFree; free != 1 {
			return fmt.Errorf("%d slots free, want the one given back", free)
		}
		return nil
	})
	w.grant(vm, fs("ro", p, "/d29"), "d29")
	if err := g.reads("d29", "file 29"); err != nil {
		t.Error(err)
	}
	over("no free slot")

	// The same VM under a broker with a lower bound of its own.
	w.revoke(ids[1])
	w.must(w.StopBroker(os.Interrupt))
	w.BrokerArgs = append(w.BrokerArgs, "--max-grants", strconv.Itoa(slotsPerSegment-1))
	w.start()
	over("as many as one VM may")
}

// TestManyCycles grants and revokes two hundred times, and nothing is left.
func TestManyCycles(t *testing.T) {
	const cycles = 200
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "one.txt": "single\n"})
	vm := w.vm(p, "busy", smallVM)
	w.start()
	g := w.boot(vm)[0]
	w.revoke(w.grant(vm, fs("ro", p, "/docs"), "warm").ID)
	free := w.show(vm).SlotsFree
	before := w.footprint(vm)

	began := time.Now()
	cycle := func(i int, label string) error {
		capability, file, want := fs("ro", p, "/docs"), "a.txt", "alpha"
		if i%2 == 1 {
			capability, file, want = fs("rw", p, "/one.txt"), "one.txt", "single"
		}
		grant, err := w.tryGrant(vm, capability, label)
		if err != nil || grant.State != api.GrantActive {
			return fmt.Errorf("the grant is %s, %w", grant.State, err)
		}
		if i%20 < 2 {
			if out, status := g.sh("cat /run/spectrum/fs/" + label + "/" + file); status != 0 || out != want {
				return fmt.Errorf("the guest reads %q, status %d (%s)", out, status, grant.Reason)
			}
		}
		done, err := w.Client.Revoke(w.ctx(time.Minute), api.RevokeRequest{IDs: []string{grant.ID.String()}, Wait: true})
		if err != nil || len(done.Revoked) != 1 {
			return fmt.Errorf("%d revoked, %w", len(done.Revoked), err)
		}
		return nil
	}
	// One after the other: an emulated guest is no faster with several at once.
	for i := range cycles {
		if err := cycle(i, "cycle"); err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
	}
	took := time.Since(began)
	t.Logf("%d cycles in %v, %v each", cycles, took.Round(10*time.Millisecond), (took / cycles).Round(time.Millisecond))
	w.emptyAgain(vm, free)
	after := w.footprint(vm)
	for what, n := range after {
		if n > before[what]+2 {
			t.Errorf("%s: %d, was %d before %d cycles", what, n, before[what], cycles)
		}
	}
	if out, _ := g.sh("ls /run/spectrum/fs; grep -c virtiofs /proc/mounts"); out != "0" {
		t.Errorf("left in the guest: %q", out)
	}
	if v := w.show(vm); len(v.Degraded) > 0 || v.Grants != 0 {
		t.Errorf("the VM is degraded (%v) or holds %d grants", v.Degraded, v.Grants)
	}
}

// emptyAgain asserts that the VM's shim serves nothing and that every slot is
// free again.
func (w *world) emptyAgain(vm uuid.UUID, free int) {
	w.t.Helper()
	w.eventually(10*time.Second, func() error {
		if err := w.stillServed(vm); err != nil {
			return err
		}
		if now := w.show(vm).SlotsFree; now != free {
			return fmt.Errorf("%d slots are free, want %d", now, free)
		}
		return nil
	})
}

// footprint counts what could leak: processes, descriptors, files, mounts.
func (w *world) footprint(vm uuid.UUID) map[string]int {
	w.t.Helper()
	client, err := shim.Dial(w.VMDir(vm))
	w.must(err)
	pid := client.Proc().PID
	client.Close()
	fds := func(pid int) int {
		entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		return len(entries)
	}
	files, _ := filepath.Glob(w.VMDir(vm) + "/*")
	return map[string]int{
		"processes":                   len(w.Processes()),
		"processes beneath the shim":  len(descendants(pid)),
		"descriptors of the shim":     fds(pid),
		"descriptors of the broker":   fds(w.BrokerPID()),
		"files in the VM's directory": len(files),
		"mounts":                      len(w.Mounts()),
	}
}
