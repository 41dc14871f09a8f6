package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/broker/api"
)

// TestPathsCannotEscape asks for everything that is not beneath files/, and
// wants each refused for its own reason, with nothing granted.
func TestPathsCannotEscape(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "a", "there/x": "x"})
	vm := w.vm(p, "reader", smallVM)
	files := p.Dir + "/files"
	w.must(os.Symlink("/etc", files+"/link"))
	w.must(os.Symlink("../svc", files+"/svc-link"))
	w.must(os.Symlink("docs", files+"/inside-link"))
	w.must(unix.Mkfifo(files+"/fifo", 0o600))
	w.must(unix.Mknod(files+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	w.must(os.Mkdir(files+"/mounted", 0o755))
	w.must(unix.Mount("tmpfs", files+"/mounted", "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = unix.Unmount(files+"/mounted", unix.MNT_DETACH) })
	w.must(os.WriteFile(files+"/mounted/secret", []byte("s"), 0o644))
	w.start()
	w.boot(vm)

	for _, c := range []struct{ path, says string }{
		{"/../svc", ".."},
		{"/docs/../../svc", ".."},
		{"/.", `"."`},
		{"/svc", "svc does not exist"},
		{"/svc/policy/grant.rego", "svc does not exist"},
		{"/link", "symbolic link"},
		{"/link/passwd", "symbolic link"},
		{"/svc-link/policy", "symbolic link"},
		{"/inside-link/a.txt", "symbolic link"},
		{"/mounted", "mount"},
		{"/mounted/secret", "mount"},
		{"/fifo", "fifo"},
		{"/null", "device"},
		{"docs", "does not begin with"},
		{"//docs", "empty"},
		{"/docs/a.txt/b", "not a directory"},
		{"/missing", "missing does not exist"},
		{"/nul\x00byte", "NUL"},
		{"/\xff", "not Unicode"},
		{"/" + strings.Repeat("a", 256), "255"},
		{strings.Repeat("/aaaaaaaaa", 500), "4096"},
	} {
		_, err := w.tryGrant(vm, fs("ro", p, c.path), "")
		shown := fmt.Sprintf("%.40q", c.path)
		switch e, ok := errors.AsType[*api.Error](err); {
		case !ok:
			t.Errorf("%s: granted, or failed oddly: %v", shown, err)
		case e.Code != api.CodeInvalid:
			t.Errorf("%s: code %s: %v", shown, e.Code, e)
		case !strings.Contains(strings.ToLower(e.Detail), strings.ToLower(c.says)):
			t.Errorf("%s: refused with %q, which does not say %q", shown, e.Detail, c.says)
		}
	}
	grants, err := w.Client.ListGrants(w.ctx(10*time.Second), api.GrantFilter{All: true})
	if err != nil || len(grants) != 0 {
		t.Errorf("grants %v, %v; want none", grants, err)
	}
}

// TestParentSwappedWithSymlink swaps the directory above what is granted with
// a link to the host's files in a tight loop, as a guest that owns it can.
// Whatever is granted must be the partition's own file.
func TestParentSwappedWithSymlink(t *testing.T) {
	const swaps, wanted = 10_000, 30
	w := newWorld(t)
	p := w.partition(map[string]string{"box/in/mark": "the partition's\n"})
	vm := w.vm(p, "reader", smallVM)
	outside := filepath.Join(w.Dir, "outside")
	w.must(os.MkdirAll(outside+"/in", 0o755))
	w.must(os.WriteFile(outside+"/in/mark", []byte("the host's\n"), 0o644))
	w.start()
	g := w.boot(vm)[0]

	box := p.Dir + "/files/box"
	w.must(os.Rename(box, box+".real"))
	w.must(os.Symlink(outside, box+".link"))
	w.must(os.Symlink("box.real", box))
	var count atomic.Int64
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		// box is now the directory, now a link out of the partition: renames
		// exchange the two, so that the name never is absent.
		_ = os.Remove(box)
		_ = os.Rename(box+".real", box)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, box, unix.AT_FDCWD, box+".link", unix.RENAME_EXCHANGE); err != nil {
				t.Errorf("swap: %v", err)
				return
			}
			count.Add(1)
		}
	})
	granted, refused := 0, 0
	for count.Load() < swaps || granted+refused < wanted {
		grant, err := w.tryGrant(vm, fs("ro", p, "/box/in"), "box")
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), "symbolic link") {
				t.Errorf("refused for another reason: %v", err)
			}
			continue
		}
		granted++
		if out, _ := g.sh("cat /run/spectrum/fs/box/mark"); out != "the partition's" {
			t.Fatalf("ESCAPE: the guest reads %q", out)
		}
		w.revoke(grant.ID)
		w.eventually(10*time.Second, func() error { return g.absent("/run/spectrum/fs/box") })
		if granted >= 12 && count.Load() >= swaps {
			break
		}
	}
	close(stop)
	swapper.Wait()
	t.Logf("%d swaps, %d granted, %d refused", count.Load(), granted, refused)
	if granted == 0 || refused == 0 {
		t.Errorf("%d granted and %d refused: the race was not run", granted, refused)
	}
}

// TestSetIDAndDevices has the guest try to leave what would be dangerous on
// the host.
func TestSetIDAndDevices(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"drop/keep": ""})
	const owner = 12345
	w.must(filepath.WalkDir(p.Dir+"/files", func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, owner, owner))
	}))
	vm := w.vm(p, "writer", smallVM)
	w.start()
	g := w.boot(vm)[0]
	w.grant(vm, fs("rw", p, "/drop"), "drop")

	d := "/run/spectrum/fs/drop"
	for _, line := range []string{
		"cp /bin/busybox %[1]s/sh && chown 0:0 %[1]s/sh; chmod 4755 %[1]s/sh",
		"touch %[1]s/sgid; chmod 2755 %[1]s/sgid",
		"mkdir %[1]s/dir; chmod 2777 %[1]s/dir",
		"umask 0; mkdir -m 6777 %[1]s/dir2",
	} {
		out, status := g.sh(fmt.Sprintf(line, d))
		if status == 0 {
			t.Errorf("%s: succeeded: %s", fmt.Sprintf(line, d), out)
		} else if !strings.Contains(out, "not permitted") {
			t.Errorf("%s: failed with %q", fmt.Sprintf(line, d), out)
		}
	}
	for _, line := range []string{"mknod %[1]s/null c 1 3", "mknod %[1]s/sda b 8 0"} {
		if out, status := g.sh(fmt.Sprintf(line, d)); status == 0 || !strings.Contains(out, "not permitted") {
			t.Errorf("%s: status %d, %q", fmt.Sprintf(line, d), status, out)
		}
	}
	g.sh(fmt.Sprintf("echo x > %[1]s/plain; mkdir %[1]s/plaindir; sync", d))
	seen := 0
	err := filepath.WalkDir(p.Dir+"/files/drop", func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		seen++
		if st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			t.Errorf("%s has mode %o", path, st.Mode)
		}
		if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
			t.Errorf("%s is of type %o", path, kind)
		}
		if st.Uid != owner || st.Gid != owner {
			t.Errorf("%s belongs to %d:%d, want the partition's owner %d", path, st.Uid, st.Gid, owner)
		}
		if n, err := unix.Lgetxattr(path, "security.capability", nil); err == nil {
			t.Errorf("%s has a file capability of %d bytes", path, n)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if seen < 5 {
		t.Errorf("only %d files were looked at", seen)
	}
}
