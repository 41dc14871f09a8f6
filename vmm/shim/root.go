package shim

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// fsRoot is the root of one virtiofsd: an empty read-only tmpfs with
//
//	/share  what the guest sees
//	/proc   this process only, read-only; virtiofsd re-opens descriptors through it
//	/lib    the loader's libraries, where virtiofsd is not static
//
// and afterwards virtiofsd confines itself to /share.
type fsRoot struct {
	share  int
	single string
	libs   []library
}

// library is a read-only mount of one file.
type library struct {
	at   string // relative to the root
	tree int
}

const (
	shareAt    = "share"
	procAt     = "proc"
	libAt      = "lib"
	rootSize   = "size=256k,nr_inodes=256,mode=0755"
	singleSize = "size=4k,nr_inodes=4,mode=0755"
)

// planRoot clones the mounts that the root will have. That must come before
// the mount namespace is made: only mounts of the own namespace can be cloned.
func planRoot(bin *os.File, spec *launchSpec) (*fsRoot, error) {
	share, err := cloneMount(shareFD, "", unix.AT_EMPTY_PATH, spec.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("cannot clone the share's mount: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(share, &st); err != nil {
		return nil, err
	}
	switch kind := st.Mode & unix.S_IFMT; {
	case spec.SingleFile == "" && kind != unix.S_IFDIR:
		return nil, fmt.Errorf("the share is not a directory (mode %o)", st.Mode)
	case spec.SingleFile != "" && kind != unix.S_IFREG:
		return nil, fmt.Errorf("the share is not a regular file (mode %o)", st.Mode)
	}
	r := &fsRoot{share: share, single: spec.SingleFile}
	needed, err := dynamicFiles(bin)
	if err != nil {
		return nil, fmt.Errorf("cannot tell what %s loads: %w", bin.Name(), err)
	}
	for _, n := range needed {
		tree, err := cloneMount(unix.AT_FDCWD, n.host, 0, true)
		if err != nil {
			return nil, fmt.Errorf("cannot clone the mount of %s: %w", n.host, err)
		}
		r.libs = append(r.libs, library{at: n.inside, tree: tree})
	}
	return r, nil
}

// cloneMount makes a detached mount of exactly this file or directory, without
// what is mounted beneath it.
func cloneMount(dirfd int, path string, flags uint, readOnly bool) (int, error) {
	fd, err := unix.OpenTree(dirfd, path, flags|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID, Propagation: unix.MS_PRIVATE}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// enter makes the root and leaves everything else. The working directory is
// the VM's runtime directory.
func (r *fsRoot) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("cannot make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot part from the host's mounts: %w", err)
	}
	const flags = unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", rootDirName, "tmpfs", flags, rootSize); err != nil {
		return fmt.Errorf("cannot mount an empty root: %w", err)
	}
	if err := unix.Chdir(rootDirName); err != nil {
		return err
	}
	if err := r.fill(); err != nil {
		return err
	}
	if err := unix.Mount("", ".", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("cannot make the root read-only: %w", err)
	}
	// The old root is stacked on the new one and detached with all its mounts.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot enter the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot leave the old root: %w", err)
	}
	return unix.Chdir("/")
}

func (r *fsRoot) fill() error {
	for _, dir := range []string{shareAt, procAt} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	const flags = unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC
	if r.single == "" {
		if err := attach(r.share, shareAt); err != nil {
			return fmt.Errorf("cannot attach the share: %w", err)
		}
	} else {
		// virtiofsd shares directories only.
		const dirFlags = unix.MS_NODEV | unix.MS_NOSUID
		if err := unix.Mount("tmpfs", shareAt, "tmpfs", dirFlags, singleSize); err != nil {
			return fmt.Errorf("cannot mount a directory for the file: %w", err)
		}
		if err := placeFile(r.share, filepath.Join(shareAt, r.single)); err != nil {
			return fmt.Errorf("cannot attach the file: %w", err)
		}
		if err := unix.Mount("", shareAt, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|dirFlags, ""); err != nil {
			return err
		}
	}
	for _, l := range r.libs {
		if err := os.MkdirAll(filepath.Dir(l.at), 0o755); err != nil {
			return err
		}
		if err := placeFile(l.tree, l.at); err != nil {
			return fmt.Errorf("cannot attach %s: %w", l.at, err)
		}
	}
	// Read-only, or a virtiofsd that was taken over could set the host's
	// kernel parameters, for which a user id of 0 is enough.
	if err := unix.Mount("proc", procAt, "proc", flags|unix.MS_RDONLY, "hidepid=2"); err != nil {
		return fmt.Errorf("cannot mount proc: %w", err)
	}
	return nil
}

func placeFile(tree int, at string) error {
	f, err := os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return attach(tree, at)
}

func attach(tree int, at string) error {
	return unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// env is virtiofsd's whole environment.
func (r *fsRoot) env() []string {
	if len(r.libs) == 0 {
		return nil
	}
	return []string{"LD_LIBRARY_PATH=/" + libAt}
}
