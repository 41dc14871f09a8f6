package guest

import (
	"context"
	"embed"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

//go:embed root
var root embed.FS

// Options are the inputs of an image.
type Options struct {
	Busybox string // a static busybox
	Modules string // lib/modules/<release> of the kernel it is booted with
	Agent   string // spectrum-agent, static
	Exec    string // spectrum-test-exec, static
}

// What an agent needs to answer is loaded before it starts, the rest beside
// it. Names with '_', as the kernel has them.
var (
	firstModules = []string{"virtio_pci", "vmw_vsock_virtio_transport"}
	laterModules = []string{"virtiofs", "button", "evdev", "virtio_console", "virtio_net", "virtio_blk"}
)

// applets are the names busybox is called by in the guest.
var applets = strings.Fields(`
acpid addgroup ash awk base64 basename blkid cat chgrp chmod chown chroot clear cmp cp cttyhack cut
date dd df diff dirname dmesg du echo egrep env expr false find free getopt grep head hexdump hostname id
init insmod install ip kill killall ln ls lsmod md5sum mkdir mkfifo mknod mktemp modprobe more mount
mountpoint mv nc nslookup od pgrep pidof ping pkill poweroff printenv printf ps pwd readlink realpath
reboot rm rmdir rmmod sed seq setsid sh sha256sum sleep sort stat stty su sync sysctl tail tar tee test
time timeout top touch tr true truncate tty umount uname uniq unlink uptime usleep vi wc wget which
whoami xargs xxd yes`)

// Build writes the image to w.
func Build(ctx context.Context, o Options, w io.Writer) error {
	t := tree{}
	for _, d := range []string{"dev", "proc", "run", "sys", "mnt", "root"} {
		t.dir(d, 0o755)
	}
	t.dir("tmp", 0o1777)
	t.add("dev/console", entry{mode: modeChar | 0o600, major: 5, minor: 1})
	t.add("dev/null", entry{mode: modeChar | 0o666, major: 1, minor: 3})
	if err := t.embedded(); err != nil {
		return err
	}
	for name, from := range map[string]string{
		"bin/busybox": o.Busybox, "bin/spectrum-agent": o.Agent, "bin/spectrum-test-exec": o.Exec,
	} {
		b, err := os.ReadFile(from)
		if err != nil {
			return fmt.Errorf("cannot add %s: %w", name, err)
		}
		t.file(name, 0o755, b)
	}
	for _, a := range applets {
		t.link("bin/"+a, "busybox")
	}
	t.link("sbin", "bin")
	t.link("usr/bin", "../bin")
	t.link("usr/sbin", "../bin")
	t.link("init", "bin/busybox")
	if err := t.modules(ctx, o.Modules); err != nil {
		return err
	}
	return t.write(w)
}

// embedded adds the files under root/; scripts are those in etc/rc.d.
func (t tree) embedded() error {
	return fsWalk(root, "root", func(name string, b []byte) {
		perm := uint32(0o644)
		if strings.HasPrefix(name, "etc/rc.d/") || strings.HasPrefix(name, "etc/acpi/") {
			perm = 0o755
		}
		t.file(name, perm, b)
	})
}

// modules adds the module files and the two lists that the guest loads.
func (t tree) modules(ctx context.Context, dir string) error {
	m, err := openModules(dir)
	if err != nil {
		return err
	}
	have := map[string]bool{}
	if err := t.moduleList(ctx, m, "first", firstModules, have); err != nil {
		return err
	}
	return t.moduleList(ctx, m, "later", laterModules, have)
}

func (t tree) moduleList(ctx context.Context, m *modules, list string, wanted []string, have map[string]bool) error {
	mods, err := m.load(ctx, wanted, have)
	if err != nil {
		return err
	}
	var names strings.Builder
	for _, mod := range mods {
		t.file("lib/modules/"+mod.name+".ko", 0o644, mod.data)
		fmt.Fprintln(&names, "/lib/modules/"+mod.name+".ko")
	}
	t.file("lib/modules/"+list, 0o644, []byte(names.String()))
	return nil
}

func fsWalk(f embed.FS, dir string, add func(name string, b []byte)) error {
	entries, err := f.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		if e.IsDir() {
			if err := fsWalk(f, p, add); err != nil {
				return err
			}
			continue
		}
		b, err := f.ReadFile(p)
		if err != nil {
			return err
		}
		add(strings.TrimPrefix(p, "root/"), b)
	}
	return nil
}
