package applyfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
)

func (w *world) apply(o reconcile.Object) (note string, err error) {
	return New(w, mountTime).Apply(w.t.Context(), o)
}

// noneHeld asserts that nothing of the partition stays open in this process.
func (w *world) noneHeld() {
	w.t.Helper()
	if held := w.held(); len(held) != 0 {
		w.t.Errorf("still open here: %v", held)
	}
}

func TestWhatIsShared(t *testing.T) {
	for name, c := range map[string]struct {
		path     string
		rights   []string
		single   string
		readOnly bool
	}{
		"directory, read":  {"/docs", []string{"read"}, "", true},
		"directory, write": {"/docs", []string{"read", "write"}, "", false},
		"file, read":       {"/docs/one", []string{"read"}, "one", true},
		"file, write":      {"/docs/one", []string{"read", "write"}, "one", false},
		"all files":        {"/", []string{"read"}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			s := w.fake()
			a := &goodAgent{}
			w.agent = a
			o := w.object("label", 7, w.capability(c.path, c.rights...))
			note, err := w.apply(o)
			if err != nil || note != "" {
				t.Fatalf("note %q, error %v", note, err)
			}
			spec, file, ok := s.put(o.ID)
			id := uuid.MustParse(strings.TrimPrefix(o.ID, "fs-"))
			want := shim.Object{
				ID: o.ID, Generation: 7, Instance: o.Instance, Tag: strings.ReplaceAll(id.String(), "-", ""),
				ReadOnly: c.readOnly, SingleFile: c.single, UID: 1234, GID: 1235,
			}
			if !ok || spec != want {
				t.Errorf("the shim was told %+v, want %+v", spec, want)
			}
			var st unix.Stat_t
			if err := unix.Stat(w.path(c.path), &st); err != nil {
				t.Fatal(err)
			}
			if file.Dev != st.Dev || file.Ino != st.Ino {
				t.Errorf("the shim got inode %d, want %d", file.Ino, st.Ino)
			}
			mounted := wire.MountRequest{Tag: want.Tag, Label: "label", ReadOnly: c.readOnly, File: c.single, TimeoutMS: int(mountTime.Milliseconds())}
			if got := a.seen(); !slices.Equal(got, []wire.MountRequest{mounted}) {
				t.Errorf("the agent was told %+v, want %+v", got, mounted)
			}
			w.noneHeld()
		})
	}
}

// What is shared is what was opened, whatever has its name by then.
func TestRenamedWhileItIsShared(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	var before unix.Stat_t
	if err := unix.Stat(w.path("docs"), &before); err != nil {
		t.Fatal(err)
	}
	w.seams.arm(beforePut, func() {
		if err := unix.Renameat2(unix.AT_FDCWD, w.path("docs"), unix.AT_FDCWD, w.path("other"), unix.RENAME_EXCHANGE); err != nil {
			t.Error(err)
		}
	})
	o := w.object("a", 1, w.capability("/docs", "read"))
	if _, err := w.apply(o); err != nil {
		t.Fatal(err)
	}
	if _, file, _ := s.put(o.ID); file.Ino != before.Ino {
		t.Errorf("the shim got inode %d, want %d: the name was opened again", file.Ino, before.Ino)
	}
}

func TestPathIsRefused(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	for name, to := range map[string]string{"out": "../svc", "within": "docs", "root": "/"} {
		if err := os.Symlink(to, w.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(w.path("fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, c := range map[string]struct {
		reason error
		about  string
	}{
		"/none":          {sources.ErrNotFound, "none"},
		"/docs/none/one": {sources.ErrNotFound, "docs/none"},
		"/docs/one/more": {sources.ErrNotDirectory, "docs/one"},
		"/out":           {sources.ErrSymlink, "out"},
		"/out/policy":    {sources.ErrSymlink, "out"},
		"/within":        {sources.ErrSymlink, "within"},
		"/within/one":    {sources.ErrSymlink, "within"},
		"/root/etc":      {sources.ErrSymlink, "root"},
		"/fifo":          {sources.ErrFileType, "fifo"},
	} {
		t.Run(path, func(t *testing.T) {
			c2 := w.capability(path, "read")
			o := w.object(path, 1, c2)
			_, applied := w.apply(o)
			for doing, err := range map[string]error{"check": New(w, mountTime).Check(t.Context(), c2), "apply": applied} {
				if !errors.Is(err, c.reason) || !strings.Contains(err.Error(), c.about+" ") || !strings.Contains(err.Error(), w.partition.ID.String()) {
					t.Errorf("%s: %v, want that %s %v", doing, err, c.about, c.reason)
				}
				if errors.Is(err, reconcile.ErrNotNow) {
					t.Errorf("%s: %v would be tried for ever", doing, err)
				}
			}
			if _, _, ok := s.put(o.ID); ok {
				t.Error("it is shared all the same")
			}
			w.noneHeld()
		})
	}
	if w.asked {
		t.Error("an agent was asked to mount what is not shared")
	}
}

func TestPartitionIsMissing(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	w.gone = true
	c := w.capability("/docs", "read")
	o := w.object("a", 1, c)
	_, applied := w.apply(o)
	for doing, err := range map[string]error{"check": New(w, mountTime).Check(t.Context(), c), "apply": applied} {
		if want := fmt.Sprintf("partition %s is not there", w.partition.ID); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %q", doing, err, want)
		}
	}
	if _, _, ok := s.put(o.ID); ok {
		t.Error("it is shared all the same")
	}
	// What is in the way of an application is in the way of no withdrawal.
	if _, err := New(w, mountTime).Withdraw(t.Context(), o); err != nil {
		t.Errorf("cannot withdraw: %v", err)
	}
}

// Its directory may be taken away under a partition that is still listed.
func TestPartitionIsTakenAway(t *testing.T) {
	w := newWorld(t)
	w.fake()
	if err := os.Rename(w.path(), w.path()+".away"); err != nil {
		t.Fatal(err)
	}
	_, err := w.apply(w.object("a", 1, w.capability("/docs", "read")))
	if !errors.Is(err, sources.ErrNotFound) || !strings.Contains(err.Error(), "files ") {
		t.Errorf("error %v, want that files %v", err, sources.ErrNotFound)
	}
	w.noneHeld()
}

func TestCheckClosesWhatItOpened(t *testing.T) {
	w := newWorld(t)
	a := New(w, mountTime)
	c := w.capability("/docs/one", "read")
	all := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	if err := a.Check(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	before := all()
	for range 100 {
		if err := a.Check(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if err := a.Check(t.Context(), w.capability("/docs/none", "read")); !errors.Is(err, sources.ErrNotFound) {
			t.Fatalf("error %v, want %v", err, sources.ErrNotFound)
		}
	}
	w.noneHeld()
	if after := all(); after > before+10 {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// Only files are this applier's.
func TestOtherKindsAreRefused(t *testing.T) {
	w := newWorld(t)
	w.fake()
	c := capabilities.Capability{Kind: "net"}
	if err := New(w, mountTime).Check(t.Context(), c); err == nil || !strings.Contains(err.Error(), "is not a file capability") {
		t.Errorf("error %v", err)
	}
}

func TestShimRefuses(t *testing.T) {
	for code, notNow := range map[string]bool{
		shim.CodeNotRunning: true, shim.CodeWrongInstance: true,
		shim.CodeNoSlots: false, shim.CodeStaleGeneration: false, shim.CodeVMM: false, shim.CodeLaunch: false,
		shim.CodeBadRequest: false, shim.CodeExpired: false, shim.CodeRemoved: false, shim.CodeRetired: false,
	} {
		t.Run(code, func(t *testing.T) {
			w := newWorld(t)
			s := w.fake()
			s.putErr = &shim.Error{Code: code, Message: "the reason is " + code}
			note, err := w.apply(w.object("a", 1, w.capability("/docs", "read")))
			if note != "" || !errors.Is(err, &shim.Error{Code: code}) || !strings.Contains(err.Error(), "the reason is "+code) {
				t.Fatalf("note %q, error %v; want the shim's own reason", note, err)
			}
			if got := errors.Is(err, reconcile.ErrNotNow); got != notNow {
				t.Errorf("%v is %v: %v, want %v", err, reconcile.ErrNotNow, got, notNow)
			}
			if w.asked {
				t.Error("an agent was asked to mount what is not shared")
			}
			w.noneHeld()
		})
	}
}

func TestAnotherRunsShare(t *testing.T) {
	w := newWorld(t)
	w.fake()
	o := w.object("a", 1, w.capability("/docs", "read"))
	o.Instance = uuid.NewString()
	if _, err := w.apply(o); !errors.Is(err, reconcile.ErrNotNow) || !errors.Is(err, &shim.Error{Code: shim.CodeWrongInstance}) {
		t.Errorf("error %v, want %v because of another instance", err, reconcile.ErrNotNow)
	}
}

func TestObserveFailsRatherThanGuess(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	a := New(w, mountTime)
	if _, err := w.apply(w.object("a", 1, w.capability("/docs", "read"))); err != nil {
		t.Fatal(err)
	}
	s.err = errors.New("the shim does not answer")
	if seen, err := a.Observe(t.Context(), w.vm); !errors.Is(err, s.err) || len(seen) != 0 {
		t.Errorf("observed %v, %v, want %v", seen, err, s.err)
	}
	s.err = nil
	// Between two runs nothing is known.
	s.finish(shim.Starting)
	if seen, err := a.Observe(t.Context(), w.vm); !errors.Is(err, reconcile.ErrNotNow) || len(seen) != 0 {
		t.Errorf("observed %v, %v between two runs, want %v", seen, err, reconcile.ErrNotNow)
	}
	w.set(nil)
	if seen, err := a.Observe(t.Context(), w.vm); err != nil || len(seen) != 0 {
		t.Errorf("observed %v, %v in a VM that does not run", seen, err)
	}
}

// The present run is that of the shim, whatever others know yet.
func TestRun(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	var a reconcile.RunTeller = New(w, mountTime)
	for range 2 {
		if run, err := a.Run(t.Context(), w.vm); err != nil || run != s.run() {
			t.Errorf("run %q, error %v, want run %q", run, err, s.run())
		}
		s.reboot()
	}
	s.finish(shim.Starting)
	if _, err := a.Run(t.Context(), w.vm); !errors.Is(err, reconcile.ErrNotNow) {
		t.Errorf("error %v between two runs, want %v", err, reconcile.ErrNotNow)
	}
	w.set(nil)
	if _, err := a.Run(t.Context(), w.vm); !errors.Is(err, reconcile.ErrNotNow) {
		t.Errorf("error %v of a VM that does not run, want %v", err, reconcile.ErrNotNow)
	}
}

func TestPresence(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	for phase, want := range map[string]reconcile.Presence{
		shim.Attaching: reconcile.Arriving, shim.Attached: reconcile.Present,
		shim.Detaching: reconcile.Leaving, shim.Gone: reconcile.Gone,
		"of a later shim": reconcile.Leaving, // it may give access, so it is not gone
	} {
		s.mu.Lock()
		s.objects = map[string]*fakeObject{"x": {spec: shim.Object{ID: "x", Generation: 3}, phase: phase}}
		s.mu.Unlock()
		seen, err := New(w, mountTime).Observe(t.Context(), w.vm)
		is := reconcile.Observed{ID: "x", Kind: Kind, VM: w.vm, Instance: s.run(), Generation: 3, Presence: want}
		if err != nil || len(seen) != 1 || !reflect.DeepEqual(seen[0], is) {
			t.Errorf("%s: observed %+v, %v, want %+v", phase, seen, err, is)
		}
	}
	s.mu.Lock()
	clear(s.objects)
	s.mu.Unlock()
}

// A guest that does not let go delays the withdrawal to its deadline and no
// more. What served the share is killed, and people are told.
func TestGuestHoldsAShare(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	o := w.object("a", 1, w.capability("/docs", "read"))
	if _, err := w.apply(o); err != nil {
		t.Fatal(err)
	}
	s.holds = true
	a := New(w, mountTime)
	o.Generation = 2
	if _, err := a.Withdraw(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	seen, err := a.Observe(t.Context(), w.vm)
	if err != nil || len(seen) != 1 || seen[0].Presence != reconcile.Gone || !strings.Contains(seen[0].Detail, "was killed") {
		t.Errorf("observed %+v, %v", seen, err)
	}
	o.Generation = 3
	_, err = w.apply(o)
	if !errors.Is(err, &shim.Error{Code: shim.CodeRetired}) || errors.Is(err, reconcile.ErrNotNow) {
		t.Errorf("given again in this run: %v, want that it is retired", err)
	}
}

func TestWithdrawNeedsNoAgent(t *testing.T) {
	w := newWorld(t)
	w.fake()
	o := w.object("a", 1, w.capability("/docs", "read"))
	if _, err := w.apply(o); err != nil {
		t.Fatal(err)
	}
	w.asked = false
	w.agent = nil // it would be a panic to use it
	if _, err := New(w, mountTime).Withdraw(t.Context(), o); err != nil || w.asked {
		t.Errorf("withdrawn: %v, and the agent was asked: %v", err, w.asked)
	}
}

// A shim that does not answer is no sign that a share is gone, unless the VM
// ended meanwhile.
func TestWithdrawFailsRatherThanGuess(t *testing.T) {
	w := newWorld(t)
	s := w.fake()
	s.err = errors.New("the shim does not answer")
	o := w.object("a", 1, w.capability("/docs", "read"))
	if _, err := New(w, mountTime).Withdraw(t.Context(), o); !errors.Is(err, s.err) {
		t.Errorf("withdrawn: %v, want %v", err, s.err)
	}
	w.seams.arm(beforeRemove, func() { w.set(nil) })
	if _, err := New(w, mountTime).Withdraw(t.Context(), o); err != nil {
		t.Errorf("withdrawn from a VM that ended meanwhile: %v", err)
	}
}

func TestObjects(t *testing.T) {
	w := newWorld(t)
	g := ledger.Grant{
		ID: uuid.New(), Holder: w.vm, Instance: "run", Generation: 4, Label: "docs",
		Capability: w.capability("/docs", "read"), State: ledger.Active,
	}
	a := New(w, mountTime)
	is := a.Objects(g)
	if len(is) != 1 || is[0].ID != "fs-"+g.ID.String() || is[0].VM != w.vm || is[0].Instance != "run" || is[0].Generation != 4 || is[0].Label != "docs" {
		t.Errorf("objects %+v", is)
	}
	g.Persist = true
	if is = a.Objects(g); is[0].Instance != "" {
		t.Errorf("a grant that persists is tied to run %q", is[0].Instance)
	}
	if at := a.Place(g); at != filepath.Join(wire.MountRoot, "docs") {
		t.Errorf("it is at %q", at)
	}
	g.Reason = NoAgent
	if at := a.Place(g); at != "" {
		t.Errorf("nobody mounted it, and it is at %q", at)
	}
}
