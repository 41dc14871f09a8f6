package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func procFile(t *testing.T, p Proc, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func statusField(t *testing.T, p Proc, field string) string {
	t.Helper()
	for line := range strings.Lines(procFile(t, p, "status")) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("status has no %s", field)
	return ""
}

// descendants lists all processes below pid.
func descendants(t *testing.T, pid int) []int {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var all []int
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		for _, word := range strings.Fields(string(b)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				t.Fatal(err)
			}
			all = append(append(all, child), descendants(t, child)...)
		}
	}
	return all
}

// TestVirtiofsdSeesItsShareOnly looks at a running virtiofsd from outside.
func TestVirtiofsdSeesItsShareOnly(t *testing.T) {
	v := startVM(t, "")
	for _, c := range []struct {
		id       string
		readOnly bool
		single   string
	}{{"dir", false, ""}, {"ro", true, ""}, {"one", false, "name with space"}, {"onero", true, "x"}} {
		t.Run(c.id, func(t *testing.T) {
			dir := t.TempDir()
			shared := dir
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644); err != nil {
				t.Fatal(err)
			}
			if c.single != "" {
				shared = filepath.Join(dir, "file")
			}
			o := v.object(c.id)
			o.ReadOnly, o.SingleFile = c.readOnly, c.single
			p := v.put(o, shared).PIDs[0]

			if got := len(descendants(t, p.PID)); got != 0 {
				t.Errorf("virtiofsd has %d children", got)
			}
			// Settled: virtiofsd has confined itself and dropped capabilities.
			for end := time.Now().Add(5 * time.Second); statusField(t, p, "Seccomp_filters") != "2"; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("virtiofsd has %s filters, want ours and its own", statusField(t, p, "Seccomp_filters"))
				}
			}
			time.Sleep(20 * time.Millisecond)
			checkMounts(t, p, c.readOnly, c.single)
			checkFDs(t, p)
			if got := statusField(t, p, "NoNewPrivs"); got != "1" {
				t.Errorf("NoNewPrivs is %s", got)
			}
			// chown, dac_override, fowner, setgid, setuid
			for _, set := range []string{"CapEff", "CapPrm"} {
				if got := statusField(t, p, set); got != "00000000000000cb" {
					t.Errorf("%s is %s", set, got)
				}
			}
			if got := statusField(t, p, "CapInh"); strings.Trim(got, "0") != "" {
				t.Errorf("CapInh is %s", got)
			}
			for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts"} {
				own, _ := os.Readlink("/proc/self/ns/" + ns)
				its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.PID, ns))
				if err != nil || own == its {
					t.Errorf("namespace %s is shared: %v", ns, err)
				}
			}
			env := procFile(t, p, "environ")
			if env = strings.Trim(env, "\x00"); env != "" && env != "LD_LIBRARY_PATH=/lib" {
				t.Errorf("environment is %q", env)
			}
			// What is at its root is the share.
			name := "file"
			if c.single != "" {
				name = c.single
			}
			root := fmt.Sprintf("/proc/%d/root", p.PID)
			entries, err := os.ReadDir(root)
			if err != nil || len(entries) != 1 || entries[0].Name() != name {
				t.Errorf("root has %v, %v", entries, err)
			}
			f, err := os.OpenFile(filepath.Join(root, name), os.O_RDWR, 0)
			if err == nil {
				_ = f.Close()
			}
			if c.readOnly != (err != nil) {
				t.Errorf("opening for writing: %v", err)
			}
			if c.readOnly && !strings.Contains(err.Error(), unix.EROFS.Error()) {
				t.Errorf("refused by something else than the mount: %v", err)
			}
			if c.single != "" {
				if err := os.WriteFile(filepath.Join(root, "second"), nil, 0o644); err == nil {
					t.Error("a second file beside the single one")
				}
			}
			v.remove(c.id, 1)
		})
	}
}

// checkMounts reads mountinfo: the empty root, proc, the share and libraries.
func checkMounts(t *testing.T, p Proc, readOnly bool, single string) {
	t.Helper()
	info := procFile(t, p, "mountinfo")
	// mountinfo shows what is below the process's root, which is the share.
	for line := range strings.Lines(info) {
		f := strings.Fields(line)
		at, options := strings.ReplaceAll(f[4], `\040`, " "), ","+f[5]+","
		want := readOnly
		switch {
		case single != "" && at == "/":
			want = true
		case single != "" && at == "/"+single, single == "" && at == "/":
		default:
			t.Errorf("a mount too many: %s", line)
		}
		if got := strings.Contains(options, ",ro,"); got != want {
			t.Errorf("read-only is %v: %s", got, line)
		}
		for _, must := range []string{",nosuid,", ",nodev,"} {
			if !strings.Contains(options, must) {
				t.Errorf("without %s: %s", must, line)
			}
		}
	}
	seen := map[string]bool{}
	for line := range strings.Lines(allMounts(t, p)) {
		at := strings.ReplaceAll(strings.Fields(line)[4], `\040`, " ")
		seen[at] = true
		if at == "/" || at == "/proc" {
			if !strings.Contains(line, " ro,") {
				t.Errorf("writable: %s", line)
			}
			continue
		}
		if at != "/share" && at != "/share/"+single && !strings.HasPrefix(at, "/lib") {
			t.Errorf("a mount too many: %s", line)
		}
	}
	if !seen["/"] || !seen["/proc"] || !seen["/share"] {
		t.Errorf("mounts: %v", seen)
	}
}

// allMounts reads the mounts of a process's whole namespace. It takes a
// process of its own, since the thread that enters stays there.
func allMounts(t *testing.T, p Proc) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(exe, mountsArg, strconv.Itoa(p.PID)).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

const mountsArg = "mounts-of"

func mountsHelper(pid string) int {
	runtime.LockOSThread()
	read := func() error {
		ns, err := os.Open("/proc/" + pid + "/ns/mnt")
		if err != nil {
			return err
		}
		self, err := unix.Open("/proc/thread-self", unix.O_PATH, 0)
		if err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return err
		}
		fd, err := unix.Openat(self, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, os.NewFile(uintptr(fd), "mountinfo"))
		return err
	}
	if err := read(); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func checkFDs(t *testing.T, p Proc) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", p.PID)
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue
		}
		switch {
		case to == "/dev/null", strings.HasSuffix(to, ".log"), strings.HasPrefix(to, "socket:"),
			strings.HasPrefix(to, "anon_inode:"), strings.HasSuffix(to, "/fd"), strings.HasSuffix(to, "/mountinfo"),
			to == "/", to == "/share", strings.HasPrefix(to, "/memfd:"):
		default:
			t.Errorf("descriptor %s is %s", fd.Name(), to)
		}
	}
}

// The device of a share is free once the removal is acknowledged, but for the
// moment that the kernel takes to drop the mounts of a dead process.
func TestNothingPinsTheShare(t *testing.T) {
	v := startVM(t, "")
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
		t.Skipf("needs mkfs.ext4: %v %s", err, out)
	}
	out, err := exec.Command("losetup", "--find", "--show", image).Output()
	if err != nil {
		t.Skipf("needs a loop device: %v", err)
	}
	loop := string(bytes.TrimSpace(out))
	defer func() { _ = exec.Command("losetup", "-d", loop).Run() }()
	dir := t.TempDir()
	if err := unix.Mount(loop, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()

	// Another share on another file system lives on meanwhile.
	v.put(v.object("bystander"), t.TempDir())
	share, err := os.OpenFile(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	st, err := v.Put(t.Context(), v.object("a"), share)
	_ = share.Close()
	if err != nil {
		t.Fatal(err)
	}
	v.put(v.object("later"), t.TempDir()) // must not take the mount along
	if !alive(st.PIDs[0]) {
		t.Fatal("virtiofsd is gone")
	}
	v.remove("a", 1)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatalf("cannot unmount: %v", err)
	}
	fd, err := unix.Open(loop, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	for end := time.Now().Add(3 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		fd, err = unix.Open(loop, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		t.Fatalf("the block device is still busy: %v", err)
	}
	_ = unix.Close(fd)
}

// A mount below the shared directory is not shared.
func TestSubmountIsNotShared(t *testing.T) {
	v := startVM(t, "")
	dir := t.TempDir()
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(sub, unix.MNT_DETACH) }()
	if err := os.WriteFile(filepath.Join(sub, "secret"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	p := v.put(v.object("a"), dir).PIDs[0]
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/sub", p.PID))
	for end := time.Now().Add(5 * time.Second); err != nil && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		entries, err = os.ReadDir(fmt.Sprintf("/proc/%d/root/sub", p.PID)) // not yet in its chroot
	}
	if err != nil || len(entries) != 0 {
		t.Errorf("sub has %v, %v", entries, err)
	}
}

// needed is what the loader wants for a program.
func needed(t *testing.T, path string) []neededFile {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files, err := dynamicFiles(f)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// A static virtiofsd gets a root without libraries.
func TestStaticVirtiofsd(t *testing.T) {
	path := virtiofsd(t)
	if n := len(needed(t, path)); n > 0 {
		t.Skipf("needs a static virtiofsd, as setup builds it; %s loads %d files", path, n)
	}
	v := startVM(t, "")
	p := v.put(v.object("a"), t.TempDir()).PIDs[0]
	if env := procFile(t, p, "environ"); env != "" {
		t.Errorf("environment is %q", env)
	}
	v.remove("a", 1)
}

// A dynamic one finds its libraries. It is this test, which is dynamic where
// the race detector is on.
func TestDynamicVirtiofsd(t *testing.T) {
	needRoot(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if len(needed(t, exe)) == 0 {
		t.Skip("needs a dynamic test binary, as -race makes it")
	}
	v := startVM(t, "", func(s *Spec) { s.Virtiofsd = exe })
	p := v.put(v.object("a"), t.TempDir()).PIDs[0]
	if env := strings.Trim(procFile(t, p, "environ"), "\x00"); env != "LD_LIBRARY_PATH=/lib" {
		t.Errorf("environment is %q", env)
	}
	v.remove("a", 1)
}

func TestBadVirtiofsd(t *testing.T) {
	v := startVM(t, "", func(s *Spec) { s.Virtiofsd = "/bin/true" })
	free := v.state().SlotsFree
	begun := time.Now()
	_, err := v.Put(ctxFor(t, 10*time.Second), v.object("a"), openPath(t, t.TempDir()))
	wantCode(t, err, CodeLaunch)
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("a virtiofsd that ends at once blocked the VMM for %v", took)
	}
	if s := v.state(); s.SlotsFree != free || len(s.Degraded) > 0 {
		t.Errorf("state: %+v", s)
	}
	v = startVM(t, "", func(s *Spec) { s.Virtiofsd = "/proc/version" })
	_, err = v.Put(ctxFor(t, 10*time.Second), v.object("a"), openPath(t, t.TempDir()))
	wantCode(t, err, CodeLaunch)
}

func TestManyObjects(t *testing.T) {
	v := startVM(t, "", func(s *Spec) { s.Segments = 1; s.Stretch = 4 })
	dir := t.TempDir()
	n := v.state().SlotsFree
	if n != slotsPerSegment {
		t.Fatalf("%d slots", n)
	}
	errs := make(chan error, n)
	for i := range n {
		o := v.object(fmt.Sprintf("o%d", i))
		f := openPath(t, dir)
		go func() {
			_, err := v.Put(t.Context(), o, f)
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	_, err := v.Put(t.Context(), v.object("one-more"), openPath(t, dir))
	wantCode(t, err, CodeNoSlots)
	t.Log(memory(t, v.Proc().PID))
	for i := range n {
		go func() {
			_, err := v.Remove(t.Context(), fmt.Sprintf("o%d", i), 1)
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if s := v.state(); s.SlotsFree != n || len(s.Objects) != 0 {
		t.Errorf("state: %+v", s)
	}
	if left := descendants(t, v.Proc().PID); len(left) != 1 {
		t.Errorf("processes left beside the VMM: %v", left)
	}
}

// memory is what a process has for itself and in shares.
func memory(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return err.Error()
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		for _, k := range []string{"Rss:", "Pss:", "Private_Dirty:"} {
			if strings.HasPrefix(line, k) {
				out = append(out, strings.Join(strings.Fields(line), " "))
			}
		}
	}
	return strings.Join(out, ", ")
}

func TestLauncherWithoutOrderEnds(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	control, controlW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	status, statusW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, launchArg)
	cmd.ExtraFiles = []*os.File{control, statusW}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = control.Close(), statusW.Close()
	_ = controlW.Close()
	message := make([]byte, 100)
	n, _ := status.Read(message)
	if err := cmd.Wait(); err == nil || !strings.Contains(string(message[:n]), "gave no order") {
		t.Errorf("%v: %s", err, message[:n])
	}
}
