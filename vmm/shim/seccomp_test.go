package shim

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const filterArg = "under-the-filter"

// filterHelper runs under the filter alone, with all of root's capabilities,
// and prints what went otherwise than it should.
func filterHelper(dir string) int {
	runtime.LockOSThread()
	if err := unix.Chdir(dir); err != nil {
		fmt.Println(err)
		return 1
	}
	unix.Umask(0)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		fmt.Println(err)
		return 1
	}
	if err := installFilter(fsFilter()); err != nil {
		fmt.Println(err)
		return 1
	}
	open := func(name string, flags int, mode uint32) error {
		fd, err := unix.Openat(unix.AT_FDCWD, name, flags, mode)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}
	f, err := unix.Openat(unix.AT_FDCWD, "plain", unix.O_CREAT|unix.O_RDWR, 0o640)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	raw := func(nr uintptr, args ...uintptr) error {
		var a [6]uintptr
		copy(a[:], args)
		if _, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}
	cwd := ^uintptr(99) // AT_FDCWD
	name, _ := unix.BytePtrFromString("plain")
	p := uintptr(unsafe.Pointer(name))
	bad := 0
	check := func(what string, err error, want error) {
		if !errors.Is(err, want) {
			fmt.Printf("%s: %v, want %v\n", what, err, want)
			bad++
		}
	}
	for _, mode := range []uint32{0o4755, 0o2755, 0o6777, 0o4000} {
		what := fmt.Sprintf(" %o", mode)
		check("fchmod"+what, raw(unix.SYS_FCHMOD, uintptr(f), uintptr(mode)), unix.EPERM)
		check("fchmodat"+what, raw(unix.SYS_FCHMODAT, cwd, p, uintptr(mode)), unix.EPERM)
		check("fchmodat2"+what, raw(unix.SYS_FCHMODAT2, cwd, p, uintptr(mode), 0), unix.EPERM)
		check("fchmod high"+what, raw(unix.SYS_FCHMOD, uintptr(f), 0xdead00000000|uintptr(mode)), unix.EPERM)
		check("openat creat"+what, open("new", unix.O_CREAT|unix.O_WRONLY, mode), unix.EPERM)
		check("openat tmpfile"+what, open(".", unix.O_TMPFILE|unix.O_WRONLY, mode), unix.EPERM)
		check("mkdirat"+what, unix.Mkdirat(unix.AT_FDCWD, "newdir", mode), unix.EPERM)
		check("mknodat file"+what, unix.Mknodat(unix.AT_FDCWD, "node", unix.S_IFREG|mode, 0), unix.EPERM)
		check("openat without creat"+what, open("plain", unix.O_RDONLY, mode), nil)
	}
	for _, kind := range []uint32{unix.S_IFCHR, unix.S_IFBLK} {
		check(fmt.Sprintf("mknodat %o", kind), unix.Mknodat(unix.AT_FDCWD, "dev", kind|0o666, 0x103), unix.EPERM)
	}
	how := unix.OpenHow{Flags: unix.O_CREAT | unix.O_WRONLY, Mode: 0o4755}
	_, err = unix.Openat2(unix.AT_FDCWD, "by-openat2", &how)
	check("openat2", err, unix.ENOSYS)
	check("io_uring_setup", raw(unix.SYS_IO_URING_SETUP, 1, 0), unix.ENOSYS)
	check("setxattr", unix.Setxattr("plain", "user.x", []byte("y"), 0), unix.EPERM)
	check("fsetxattr", unix.Fsetxattr(f, "security.capability", make([]byte, 20), 0), unix.EPERM)

	check("fchmod plain", unix.Fchmod(f, 0o1777), nil)
	check("openat plain", open("ok", unix.O_CREAT|unix.O_WRONLY, 0o777), nil)
	check("mkdirat plain", unix.Mkdirat(unix.AT_FDCWD, "okdir", 0o1777), nil)
	check("mknodat plain", unix.Mknodat(unix.AT_FDCWD, "oknode", unix.S_IFREG|0o644, 0), nil)
	check("mknodat fifo", unix.Mknodat(unix.AT_FDCWD, "fifo", unix.S_IFIFO|0o644, 0), nil)
	check("mknodat socket", unix.Mknodat(unix.AT_FDCWD, "sock", unix.S_IFSOCK|0o644, 0), nil)
	archChecks(check)
	return bad
}

func TestFilter(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(exe, filterArg, dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// The world agrees.
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := os.Lstat(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode()&(os.ModeSetuid|os.ModeSetgid|os.ModeDevice) != 0 {
			t.Errorf("%s is left with mode %v", e.Name(), info.Mode())
		}
	}
	if len(out) > 0 && !strings.Contains(string(out), "PASS") {
		t.Logf("%s", out)
	}
}
