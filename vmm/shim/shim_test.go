package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/vmm/vmmtest"
)

// The test binary is the shim, its launchers, the fakes and the helper under
// the filter, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case launchArg, "serve":
			os.Exit(Main())
		case "--api-socket":
			os.Exit(vmmtest.Main(os.Args[1:]))
		case filterArg:
			os.Exit(filterHelper(os.Args[2]))
		case mountsArg:
			os.Exit(mountsHelper(os.Args[2]))
		case strangerArg:
			os.Exit(strangerHelper(os.Args[2]))
		case "--fd=" + strconv.Itoa(controlFD):
			os.Exit(fakeVirtiofsdMain())
		}
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes mount namespaces")
	}
}

func virtiofsd(t *testing.T) string {
	t.Helper()
	needRoot(t)
	if path := os.Getenv("SPECTRUM_VIRTIOFSD"); path != "" {
		return path
	}
	cache, err := os.UserCacheDir()
	if err == nil {
		path := filepath.Join(cache, "spectrum-broker/crates/bin/virtiofsd")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path, err := exec.LookPath("virtiofsd")
	if err != nil {
		t.Skip("needs virtiofsd, on PATH, in the cache or in SPECTRUM_VIRTIOFSD")
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func ctxFor(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// vm is a shim under test and its fake VM.
type vm struct {
	*Client
	t    *testing.T
	spec Spec
}

func startVM(t *testing.T, cmdline string, change ...func(*Spec)) *vm {
	t.Helper()
	v, err := tryStartVM(t, cmdline, change...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func tryStartVM(t *testing.T, cmdline string, change ...func(*Spec)) (*vm, error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	spec := Spec{
		VM: uuid.New(), RuntimeDir: filepath.Join(t.TempDir(), "vm"), VMM: exe, Virtiofsd: virtiofsd(t),
		MemoryMiB: 64, VCPUs: 1, Cmdline: cmdline, CutDeadline: 700 * time.Millisecond,
	}
	for _, c := range change {
		c(&spec)
	}
	kernel, err := os.Open("/proc/version")
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	c, err := Start(ctxFor(t, 20*time.Second), StartOptions{Binary: exe, Spec: spec, Kernel: kernel, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		if _, statErr := os.Stat(spec.RuntimeDir); !errors.Is(statErr, os.ErrNotExist) {
			t.Errorf("a failed start leaves %s: %v", spec.RuntimeDir, statErr)
		}
		return nil, err
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(spec.RuntimeDir, shimLogName))
			t.Logf("shim.log:\n%s", b)
		}
		if err := Reap(spec.RuntimeDir); err != nil {
			t.Error(err)
		}
		c.Close()
	})
	return &vm{c, t, spec}, nil
}

func (v *vm) state() State {
	v.t.Helper()
	s, err := v.State(ctxFor(v.t, 5*time.Second))
	if err != nil {
		v.t.Fatal(err)
	}
	return s
}

func (v *vm) object(id string) Object {
	return Object{ID: id, Generation: 1, Instance: v.state().Instance, Tag: "tag-" + id, UID: 1234, GID: 1235}
}

func openPath(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func (v *vm) put(o Object, dir string) ObjectState {
	v.t.Helper()
	st, err := v.Put(ctxFor(v.t, 10*time.Second), o, openPath(v.t, dir))
	if err != nil {
		v.t.Fatal(err)
	}
	return st
}

func (v *vm) remove(id string, generation uint64) ObjectState {
	v.t.Helper()
	st, err := v.Remove(ctxFor(v.t, 10*time.Second), id, generation)
	if err != nil {
		v.t.Fatal(err)
	}
	return st
}

// say drives the fake guest.
func (v *vm) say(word string) {
	v.t.Helper()
	dir, err := os.Open(v.spec.RuntimeDir)
	if err != nil {
		v.t.Fatal(err)
	}
	defer dir.Close()
	conn, err := net.Dial("unix", shortPath(dir, vmmtest.Socket))
	if err != nil {
		v.t.Fatal(err)
	}
	defer conn.Close()
	_, _ = fmt.Fprintln(conn, word)
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	var refused *Error
	if !errors.As(err, &refused) || refused.Code != code {
		t.Fatalf("error is %v, want code %s", err, code)
	}
}

func alive(p Proc) bool {
	f, err := p.open()
	if err != nil {
		return false
	}
	defer f.Close()
	return !pidfdExited(int(f.Fd()))
}

// waitDead waits for processes that nobody but the kernel ends.
func waitDead(t *testing.T, procs ...Proc) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		left := 0
		for _, p := range procs {
			if alive(p) {
				left++
			}
		}
		if left == 0 {
			return
		}
	}
	t.Fatalf("processes still live: %v", procs)
}

func (v *vm) procs() []Proc {
	v.t.Helper()
	var r records
	if err := readJSON(v.spec.RuntimeDir, recordsName, &r); err != nil {
		v.t.Fatal(err)
	}
	return r.Procs
}

func TestPutAndRemove(t *testing.T) {
	v := startVM(t, "")
	free := v.state().SlotsFree
	o := v.object("a")
	dir := t.TempDir()
	st := v.put(o, dir)
	if st.Phase != Attached || len(st.PIDs) != 1 || !alive(st.PIDs[0]) {
		t.Fatalf("put: %+v", st)
	}
	if again := v.put(o, dir); again.PIDs[0] != st.PIDs[0] {
		t.Fatal("the same put started another virtiofsd")
	}
	if s := v.state(); s.SlotsFree != free-1 || len(s.Objects) != 1 || s.VMMPid == 0 {
		t.Fatalf("state: %+v", s)
	}
	begun := time.Now()
	gone := v.remove("a", 1)
	if gone.Phase != Gone || gone.Killed || alive(st.PIDs[0]) {
		t.Fatalf("remove: %+v", gone)
	}
	if took := time.Since(begun); took > 600*time.Millisecond {
		t.Errorf("an honest guest took %v", took)
	}
	if s := v.state(); s.SlotsFree != free || len(s.Objects) != 0 || len(s.Degraded) != 0 {
		t.Fatalf("state after: %+v", s)
	}
	if v.remove("a", 1).Phase != Gone {
		t.Fatal("remove is not idempotent")
	}
	_, err := v.Put(t.Context(), o, openPath(t, dir))
	wantCode(t, err, CodeStaleGeneration)
	o.Generation = 2
	if v.put(o, dir).Phase != Attached {
		t.Fatal("the next generation is not attached")
	}
	_, err = v.Remove(t.Context(), "a", 1)
	wantCode(t, err, CodeStaleGeneration)
	left, _ := os.ReadDir(filepath.Join(v.spec.RuntimeDir, fsDirName))
	if len(left) != 2 { // a.sock, a.log
		t.Errorf("files of removed objects are left: %v", left)
	}
}

func TestPutIsChecked(t *testing.T) {
	v := startVM(t, "")
	dir := t.TempDir()
	for name, c := range map[string]struct {
		change func(*Object)
		code   string
	}{
		"other instance": {func(o *Object) { o.Instance = "other" }, CodeWrongInstance},
		"no instance":    {func(o *Object) { o.Instance = "" }, CodeWrongInstance},
		"over":           {func(o *Object) { o.Deadline = capabilities.NewDeadline(clock.System{}.Now(), 0) }, CodeExpired},
		"no generation":  {func(o *Object) { o.Generation = 0 }, CodeBadRequest},
		"bad id":         {func(o *Object) { o.ID = "../x" }, CodeBadRequest},
		"long tag":       {func(o *Object) { o.Tag = strings.Repeat("t", 37) }, CodeBadRequest},
		"file is dir":    {func(o *Object) { o.SingleFile = "x" }, CodeLaunch},
		"bad file name":  {func(o *Object) { o.SingleFile = "a/b" }, CodeBadRequest},
	} {
		o := v.object("a")
		c.change(&o)
		_, err := v.Put(t.Context(), o, openPath(t, dir))
		if wantCode(t, err, c.code); t.Failed() {
			t.Fatal(name)
		}
	}
	o := v.object("file")
	_, err := v.Put(t.Context(), o, openPath(t, "/proc/version"))
	wantCode(t, err, CodeLaunch)
	v.put(v.object("b"), dir)
	other := v.object("c")
	other.Tag = "tag-b"
	_, err = v.Put(t.Context(), other, openPath(t, dir))
	wantCode(t, err, CodeBadRequest)
	_, err = v.Put(t.Context(), v.object("b"), openPath(t, t.TempDir()))
	wantCode(t, err, CodeBadRequest)
}

func TestHostileGuestMeetsTheDeadline(t *testing.T) {
	v := startVM(t, "hold")
	free := v.state().SlotsFree
	st := v.put(v.object("a"), t.TempDir())
	begun := time.Now()
	gone := v.remove("a", 1)
	if took := time.Since(begun); took < 600*time.Millisecond || took > 2500*time.Millisecond {
		t.Errorf("the cut took %v, its deadline is %v", took, v.spec.CutDeadline)
	}
	if !gone.Killed || gone.Phase != Gone || alive(st.PIDs[0]) {
		t.Fatalf("remove: %+v", gone)
	}
	s := v.state()
	if len(s.Degraded) != 1 || s.SlotsFree != free-1 {
		t.Fatalf("state: %+v", s)
	}
	o := v.object("a")
	o.Generation = 9
	_, err := v.Put(t.Context(), o, openPath(t, t.TempDir()))
	wantCode(t, err, CodeRetired)
	if again := v.remove("a", 9); !again.Killed {
		t.Fatalf("a repeated remove forgets the kill: %+v", again)
	}
}

// A guest that goes on getting and dropping other objects cannot lengthen the
// time it holds the one that was taken from it.
func TestLaterOrdersLengthenNoDeadline(t *testing.T) {
	v := startVM(t, "keep-a")
	dir := t.TempDir()
	v.put(v.object("a"), dir)
	begun := time.Now()
	type removed struct {
		state ObjectState
		err   error
		took  time.Duration
	}
	result := make(chan removed, 1)
	ctx := ctxFor(t, 20*time.Second)
	go func() {
		st, err := v.Remove(ctx, "a", 1)
		result <- removed{st, err, time.Since(begun)}
	}()
	time.Sleep(2 * together)
	for i := 0; ; i++ {
		select {
		case r := <-result:
			if r.err != nil || !r.state.Killed || r.took > 3*v.spec.CutDeadline {
				t.Errorf("the cut took %v, its deadline is %v, after %d other objects: %+v, %v", r.took, v.spec.CutDeadline, i, r.state, r.err)
			}
			return
		default:
		}
		id := fmt.Sprintf("b%d", i)
		v.put(v.object(id), dir)
		v.remove(id, 1)
	}
}

func TestDeadlineEndsAnObject(t *testing.T) {
	v := startVM(t, "")
	o := v.object("a")
	o.Deadline = capabilities.NewDeadline(clock.System{}.Now(), 700*time.Millisecond)
	begun := time.Now()
	st := v.put(o, t.TempDir())
	p, err := st.PIDs[0].open()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := waitPidfd(p); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took < 650*time.Millisecond || took > 2500*time.Millisecond {
		t.Errorf("ended after %v", took)
	}
	// A renewed one lives on.
	o = v.object("b")
	o.Deadline = capabilities.NewDeadline(clock.System{}.Now(), 400*time.Millisecond)
	dir := t.TempDir()
	v.put(o, dir)
	o.Generation, o.Deadline = 2, capabilities.Deadline{}
	st = v.put(o, dir)
	time.Sleep(600 * time.Millisecond)
	if !alive(st.PIDs[0]) {
		t.Error("a renewed object ended at its old deadline")
	}
}

func TestRemoveOvertakesPuts(t *testing.T) {
	v := startVM(t, "slow-add")
	o := v.object("a")
	dir := t.TempDir()
	v.put(o, dir)
	puts := make(chan error, 4)
	for i := range 4 {
		o := v.object(fmt.Sprintf("p%d", i))
		go func() {
			_, err := v.Put(context.WithoutCancel(t.Context()), o, openPath(t, dir))
			puts <- err
		}()
		for len(v.state().Objects) < i+2 {
			time.Sleep(5 * time.Millisecond)
		}
		if i == 0 { // this one gets to the VMM, the others wait for it
			time.Sleep(200 * time.Millisecond)
		}
	}
	// A put that the VMM has not seen yet is taken back at once.
	begun := time.Now()
	if st := v.remove("p3", 1); st.Killed {
		t.Errorf("a waiting put counts as killed: %+v", st)
	}
	if took := time.Since(begun); took > 500*time.Millisecond {
		t.Errorf("taking back a waiting put took %v", took)
	}
	// The VMM is busy for a second with one put; three wait. The removal is
	// next, or its own deadline cuts it.
	begun = time.Now()
	v.remove("a", 1)
	if took := time.Since(begun); took > 2500*time.Millisecond {
		t.Errorf("the removal took %v behind puts", took)
	}
	failed := 0
	for range 4 {
		if err := <-puts; err != nil {
			wantCode(t, err, CodeRemoved)
			failed++
		}
	}
	if failed != 1 {
		t.Errorf("%d puts failed", failed)
	}
}

func TestRebootMakesAnInstance(t *testing.T) {
	v := startVM(t, "")
	o := v.object("a")
	st := v.put(o, t.TempDir())
	before := v.state()
	v.say("reboot")
	ctx := ctxFor(t, 10*time.Second)
	s := before
	for s.Phase != Running || s.Instance == before.Instance {
		var err error
		if s, err = v.Watch(ctx, s.Seq); err != nil {
			t.Fatal(err)
		}
		if s.Instance != before.Instance && len(s.Objects) > 0 {
			t.Fatalf("an object passed to the next instance: %+v", s)
		}
	}
	if alive(st.PIDs[0]) || s.VMMPid == before.VMMPid {
		t.Fatalf("something outlived the reboot: %+v", s)
	}
	_, err := v.Put(ctx, o, openPath(t, t.TempDir()))
	wantCode(t, err, CodeWrongInstance)
	v.put(v.object("a"), t.TempDir())
}

func TestBootFailureIsTold(t *testing.T) {
	_, err := tryStartVM(t, "no-boot")
	if err == nil || !strings.Contains(err.Error(), "Cannot load kernel") {
		t.Fatalf("error is %v", err)
	}
	_, err = tryStartVM(t, "", func(s *Spec) { s.VMM = "/nonexistent/vmm" })
	if err == nil || !strings.Contains(err.Error(), "/nonexistent/vmm") {
		t.Fatalf("error is %v", err)
	}
	_, err = tryStartVM(t, "", func(s *Spec) { s.VMM = "/bin/false" })
	if err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Fatalf("error is %v", err)
	}
}

func TestCrashedVirtiofsd(t *testing.T) {
	v := startVM(t, "hold")
	st := v.put(v.object("a"), t.TempDir())
	if err := syscall.Kill(st.PIDs[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx := ctxFor(t, 10*time.Second)
	s := v.state()
	for len(s.Degraded) == 0 {
		var err error
		if s, err = v.Watch(ctx, s.Seq); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(s.Degraded[0], "ended by itself (killed)") {
		t.Errorf("degraded: %q", s.Degraded)
	}
}
