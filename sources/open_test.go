package sources

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	files := filepath.Join(string(p.Dir), "files")
	h.write(files+"/a/b/note", "text")
	for _, path := range []string{"/", "/a", "/a/b"} {
		o, err := p.Open(rel(t, path))
		if err != nil {
			t.Fatal(err)
		}
		if !o.IsDir() {
			t.Errorf("%s is no directory", path)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
	o, err := p.Open(rel(t, "/a/b/note"))
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if o.IsDir() || o.Name() != "note" {
		t.Errorf("got %q, directory %v", o.Name(), o.IsDir())
	}
	flags, err := unix.FcntlInt(o.File().Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_PATH == 0 {
		t.Errorf("flags %x, %v: want O_PATH", flags, err)
	}
	if flags, err = unix.FcntlInt(o.File().Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor flags %x, %v: want FD_CLOEXEC", flags, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	files := filepath.Join(string(p.Dir), "files")
	h.write(files+"/a/file", "text")
	h.write(filepath.Join(string(p.Dir), "svc/policy/x.rego"), "package x")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Symlink("/etc", files+"/etc"))
	must(os.Symlink("a", files+"/inside"))
	must(os.Symlink("../../svc", files+"/a/up"))
	must(os.Symlink("file", files+"/a/last"))
	must(syscall.Mkfifo(files+"/fifo", 0o600))
	l, err := net.Listen("unix", files+"/sock")
	must(err)
	defer l.Close()

	for _, c := range []struct {
		path string
		want error
		says string
	}{
		{"/etc/passwd", ErrSymlink, "etc is a symbolic link"},
		{"/etc", ErrSymlink, "etc is"},
		{"/inside", ErrSymlink, "inside is"},
		{"/inside/file", ErrSymlink, "inside is"},
		{"/a/up/policy/x.rego", ErrSymlink, "a/up is"},
		{"/a/last", ErrSymlink, "a/last is"},
		{"/svc", ErrNotFound, "svc does not exist"},
		{"/a/none/c", ErrNotFound, "a/none does not exist"},
		{"/a/file/c", ErrNotDirectory, "a/file is not a directory"},
		{"/fifo", ErrFileType, "fifo is a FIFO"},
		{"/sock", ErrFileType, "sock is a socket"},
	} {
		o, err := p.Open(rel(t, c.path))
		if err == nil {
			o.Close()
		}
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), partA) {
			t.Errorf("%s: %v; want %v that says %q", c.path, err, c.want, c.says)
		}
	}
	if os.Getuid() == 0 {
		if err := unix.Mknod(files+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err == nil {
			if _, err := p.Open(rel(t, "/null")); !errors.Is(err, ErrFileType) || !strings.Contains(err.Error(), "character device") {
				t.Errorf("a device: %v", err)
			}
		}
	}
}

// TestOpenFilesItselfASymlink: the last thing that could lead to svc/.
func TestOpenFilesItselfASymlink(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	h.write(filepath.Join(string(p.Dir), "svc/policy/x.rego"), "package x")
	files := filepath.Join(string(p.Dir), "files")
	if err := errors.Join(os.Remove(files), os.Symlink("svc", files)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Open(rel(t, "/policy")); !errors.Is(err, ErrSymlink) {
		t.Errorf("got %v", err)
	}
}

func TestOpenUnplugged(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	if err := os.RemoveAll(string(p.Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Open(rel(t, "/a")); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// TestOpenMountPoint runs itself in a mount namespace of its own.
func TestOpenMountPoint(t *testing.T) {
	const inside = "SOURCES_TEST_IN_NAMESPACE"
	if os.Getenv(inside) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestOpenMountPoint$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) {
			t.Skipf("SKIPPED, this machine gives no user and mount namespace: %v", err)
		}
		if err != nil || !strings.Contains(string(out), "checked three mount points") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	h := newHost(t)
	p := h.partition(partA)
	files := filepath.Join(string(p.Dir), "files")
	h.write(files+"/mnt/below/x", "hidden")
	h.write(files+"/other/x", "text")
	h.write(files+"/bound", "text")
	if err := unix.Mount("tmpfs", files+"/mnt", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	h.write(files+"/mnt/below/x", "text")
	// A bind mount of the same file system has the same device number.
	for _, b := range [][2]string{{"/other", "/mnt/below"}, {"/other/x", "/bound"}} {
		if err := unix.Mount(files+b[0], files+b[1], "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	for path, says := range map[string]string{"/mnt": "mnt is a mount point", "/mnt/below/x": "mnt is a mount point", "/bound": "bound is a mount point"} {
		if _, err := p.Open(rel(t, path)); !errors.Is(err, ErrMountPoint) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, at := range []string{"/bound", "/mnt/below", "/mnt"} {
		if err := unix.Unmount(files+at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	t.Log("checked three mount points")
}

// TestOpenRace: a guest that owns a directory exchanges it with a symlink out
// of files/ all the time. Whatever is opened is what was in files/.
func TestOpenRace(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	files := filepath.Join(string(p.Dir), "files")
	inside := h.write(files+"/guest/dir/secret", "inside")
	h.write(filepath.Join(string(p.Dir), "svc/secret"), "outside")
	h.write(filepath.Join(h.partitions, "outside/secret"), "outside")
	// Both the symlink and a directory that leads up lie beside it.
	for link, to := range map[string]string{"abs": h.partitions + "/outside", "rel": "../../svc"} {
		if err := os.Symlink(to, files+"/guest/"+link); err != nil {
			t.Fatal(err)
		}
	}
	var want unix.Stat_t
	if err := unix.Stat(inside, &want); err != nil {
		t.Fatal(err)
	}
	const swaps = 20_000
	var done atomic.Bool
	failed := make(chan error, 1)
	go func() {
		defer done.Store(true)
		failed <- func() error {
			dir, err := unix.Open(files+"/guest", unix.O_PATH, 0)
			if err != nil {
				return err
			}
			defer unix.Close(dir)
			for i := range swaps {
				with := []string{"abs", "rel"}[i/2%2]
				if err := unix.Renameat2(dir, "dir", dir, with, unix.RENAME_EXCHANGE); err != nil {
					return fmt.Errorf("swap %d: %w", i, err)
				}
			}
			return nil
		}()
	}()
	path := rel(t, "/guest/dir/secret")
	opened, refused := 0, 0
	for deadline := time.Now().Add(30 * time.Second); !done.Load() && time.Now().Before(deadline); {
		o, err := p.Open(path)
		if err != nil {
			if !errors.Is(err, ErrSymlink) && !errors.Is(err, ErrChanging) && !errors.Is(err, ErrNotFound) {
				t.Errorf("refused for another reason: %v", err)
			}
			refused++
			continue
		}
		var got unix.Stat_t
		if err := unix.Fstat(int(o.File().Fd()), &got); err != nil || got.Dev != want.Dev || got.Ino != want.Ino {
			t.Errorf("escaped: opened inode %d of device %d, %v", got.Ino, got.Dev, err)
		}
		o.Close()
		opened++
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d swaps: opened %d times, refused %d times", swaps, opened, refused)
	if opened == 0 || refused == 0 {
		t.Errorf("the race was not run: opened %d times, refused %d times", opened, refused)
	}
}
