package powercut

import (
	"errors"
	"fmt"
	"io"
	"log"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Mount is a disk in the machine's tree of files.
type Mount struct {
	Disk *Disk
	Dir  string

	server *fuse.Server
	served chan struct{}
}

// Mount mounts the disk on a directory. It needs root and /dev/fuse, and
// nothing else: no program mounts it.
func (d *Disk) Mount(dir string) (*Mount, error) {
	front := &front{RawFileSystem: fuse.NewDefaultRawFileSystem(), disk: d, listings: map[uint64][]entry{}}
	server, err := fuse.NewServer(front, dir, &fuse.MountOptions{
		FsName: "powercut", Name: "powercut", DirectMountStrict: true, DisableXAttrs: true,
		DisableReadDirPlus: true, MaxWrite: 1 << 17,
		Logger: log.New(io.Discard, "", 0), // of answers that came after the cut
	})
	if err != nil {
		return nil, fmt.Errorf("cannot mount a disk on %s (it takes root and /dev/fuse): %w", dir, err)
	}
	m := &Mount{Disk: d, Dir: dir, server: server, served: make(chan struct{})}
	go func() {
		defer close(m.served)
		server.Serve()
	}()
	if err := server.WaitMount(); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot mount a disk on %s: %w", dir, err), m.Close())
	}
	return m, nil
}

// PowerCut turns the power off and takes the mount away. What used it is ended
// first, by kill, which must send SIGKILL and not wait: a process that lives on
// would be told of errors that no power cut has time to tell, and one that is
// waited for here waits for an answer.
func (m *Mount) PowerCut(kill func()) error {
	m.Disk.PowerOff()
	kill()
	return m.Close()
}

// Close takes the mount away from whoever still uses it.
func (m *Mount) Close() error {
	err := unix.Unmount(m.Dir, unix.MNT_FORCE|unix.MNT_DETACH)
	m.Disk.release()
	<-m.served
	return err
}

// release answers those who wait.
func (d *Disk) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turnOff()
	select {
	case <-d.released:
	default:
		close(d.released)
	}
}

// Reset lets a disk whose mount was closed be mounted again, as it is: a power
// cut that loses nothing.
func (d *Disk) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off, d.gone, d.released = false, make(chan struct{}), make(chan struct{})
	d.stopAt = 0
}

// front answers the kernel.
type front struct {
	fuse.RawFileSystem
	disk     *Disk
	lastDir  uint64
	listings map[uint64][]entry // of open directories; guarded by the disk
}

type entry struct {
	name string
	id   uint64
	mode uint32
}

func (f *front) String() string { return "powercut" }

// attr is what stat says of a node.
func (n *node) attr(a *fuse.Attr) {
	*a = fuse.Attr{
		Ino: n.id, Size: uint64(len(n.data)), Blocks: (uint64(len(n.data)) + sectorLen - 1) / sectorLen,
		Mode: n.mode, Nlink: uint32(max(n.links, 0)), Owner: fuse.Owner{Uid: n.uid, Gid: n.gid}, Blksize: 4096,
	}
	if n.isDir() {
		a.Nlink, a.Size = 2, 4096
	}
	a.SetTimes(nil, &n.changed, &n.changed)
}

func (n *node) entry(out *fuse.EntryOut) {
	// Nothing is cached: the timeouts stay zero.
	*out = fuse.EntryOut{NodeId: n.id, Generation: 1}
	n.attr(&out.Attr)
}

// look runs fn without counting it as an operation.
func (f *front) look(id uint64, fn func(n *node) syscall.Errno) fuse.Status {
	f.disk.mu.Lock()
	if f.disk.off {
		f.disk.mu.Unlock()
		<-f.disk.released
		return fuse.EIO
	}
	defer f.disk.mu.Unlock()
	n, ok := f.disk.nodes[id]
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	return fuse.Status(fn(n))
}

func (f *front) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	return f.look(h.NodeId, func(dir *node) syscall.Errno {
		n := f.disk.nodes[dir.names[name]]
		if n == nil {
			return syscall.ENOENT
		}
		n.entry(out)
		return 0
	})
}

func (f *front) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return f.look(in.NodeId, func(n *node) syscall.Errno {
		*out = fuse.AttrOut{}
		n.attr(&out.Attr)
		return 0
	})
}

func (f *front) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	op := SetAttr
	size, resizes := in.GetSize()
	if resizes {
		op = Truncate
	}
	return fuse.Status(f.disk.do(op, in.NodeId, "", func(n *node, _ *Fault) syscall.Errno {
		if resizes {
			if n.isDir() {
				return syscall.EISDIR
			}
			if errno := f.disk.resize(n, int64(size)); errno != 0 {
				return errno
			}
		}
		if mode, ok := in.GetMode(); ok {
			n.mode, n.unsyncedAt = n.mode&typeMask|mode&0o7777, true
		}
		if uid, ok := in.GetUID(); ok {
			n.uid = uid
		}
		if gid, ok := in.GetGID(); ok {
			n.gid = gid
		}
		*out = fuse.AttrOut{}
		n.attr(&out.Attr)
		return 0
	}))
}

// put gives a new node its first name.
func (f *front) put(op Op, h *fuse.InHeader, name string, mode uint32, out *fuse.EntryOut) fuse.Status {
	return fuse.Status(f.disk.do(op, h.NodeId, name, func(dir *node, _ *Fault) syscall.Errno {
		if dir.links == 0 {
			return syscall.ENOENT
		}
		if _, there := dir.names[name]; there {
			return syscall.EEXIST
		}
		n := f.disk.add(mode, name)
		n.uid, n.gid = h.Uid, h.Gid
		f.disk.named(dir, change{kind: linked, name: name, id: n.id})
		n.entry(out)
		return 0
	}))
}

func (f *front) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.put(Mkdir, &in.InHeader, name, syscall.S_IFDIR|in.Mode&0o7777, out)
}

func (f *front) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Mode&typeMask != syscall.S_IFREG {
		return fuse.EPERM
	}
	return f.put(Create, &in.InHeader, name, in.Mode, out)
}

func (f *front) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	out.OpenOut = opened(name)
	return f.put(Create, &in.InHeader, name, syscall.S_IFREG|in.Mode&0o7777, &out.EntryOut)
}

// opened is the answer for a file that is open now.
func opened(name string) fuse.OpenOut {
	if scratch(name) {
		return fuse.OpenOut{}
	}
	return fuse.OpenOut{OpenFlags: fuse.FOPEN_DIRECT_IO}
}

func (f *front) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	errno := f.disk.do(Open, in.NodeId, "", func(n *node, hit *Fault) syscall.Errno {
		if hit != nil && hit.Err != 0 {
			return hit.Err
		}
		if f.disk.readOnly && in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY && !scratch(n.name) {
			return syscall.EROFS
		}
		*out = opened(n.name)
		return 0
	})
	return fuse.Status(errno)
}

func (f *front) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return fuse.Status(f.disk.do(Link, in.NodeId, name, func(dir *node, _ *Fault) syscall.Errno {
		n := f.disk.nodes[in.Oldnodeid]
		if n == nil || n.links == 0 {
			return syscall.ENOENT
		}
		if _, there := dir.names[name]; there {
			return syscall.EEXIST
		}
		f.disk.named(dir, change{kind: linked, name: name, id: n.id})
		n.entry(out)
		return 0
	}))
}

func (f *front) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.take(h, name, func(n *node) syscall.Errno {
		if n.isDir() {
			return syscall.EISDIR
		}
		return 0
	})
}

func (f *front) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.take(h, name, func(n *node) syscall.Errno {
		if !n.isDir() {
			return syscall.ENOTDIR
		}
		if len(n.names) > 0 {
			return syscall.ENOTEMPTY
		}
		return 0
	})
}

func (f *front) take(h *fuse.InHeader, name string, may func(*node) syscall.Errno) fuse.Status {
	return fuse.Status(f.disk.do(Unlink, h.NodeId, name, func(dir *node, _ *Fault) syscall.Errno {
		n := f.disk.nodes[dir.names[name]]
		if n == nil {
			return syscall.ENOENT
		}
		if errno := may(n); errno != 0 {
			return errno
		}
		f.disk.named(dir, change{kind: unlinked, name: name})
		return 0
	}))
}

func (f *front) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	return fuse.Status(f.disk.do(Rename, in.NodeId, to, func(dir *node, _ *Fault) syscall.Errno {
		if in.Newdir != in.NodeId {
			return syscall.EXDEV
		}
		if in.Flags&^unix.RENAME_NOREPLACE != 0 {
			return syscall.EINVAL
		}
		n, old := f.disk.nodes[dir.names[from]], f.disk.nodes[dir.names[to]]
		switch {
		case n == nil:
			return syscall.ENOENT
		case n == old:
			return 0
		case old != nil && in.Flags&unix.RENAME_NOREPLACE != 0:
			return syscall.EEXIST
		case old != nil && old.isDir() && len(old.names) > 0:
			return syscall.ENOTEMPTY
		case old != nil && old.isDir() != n.isDir():
			return syscall.EEXIST
		}
		f.disk.named(dir, change{kind: renamed, from: from, name: to, id: n.id})
		return 0
	}))
}

func (f *front) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	var got int
	errno := f.disk.do(Read, in.NodeId, "", func(n *node, hit *Fault) syscall.Errno {
		if hit != nil && hit.Err != 0 {
			return hit.Err
		}
		if at := int(in.Offset); at < len(n.data) {
			got = copy(buf, n.data[at:])
		}
		if hit != nil && hit.Flip && got > 0 {
			buf[0] ^= 1
		}
		return 0
	})
	return fuse.ReadResultData(buf[:got]), fuse.Status(errno)
}

func (f *front) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	var wrote int
	errno := f.disk.do(Write, in.NodeId, "", func(n *node, hit *Fault) (errno syscall.Errno) {
		wrote, errno = f.disk.write(n, int64(in.Offset), data, hit)
		return errno
	})
	return uint32(wrote), fuse.Status(errno)
}

// fdatasyncFlag is FUSE_FSYNC_FDATASYNC.
const fdatasyncFlag = 1

func (f *front) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return f.sync(Sync, in)
}

func (f *front) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return f.sync(SyncDir, in)
}

func (f *front) sync(op Op, in *fuse.FsyncIn) fuse.Status {
	return fuse.Status(f.disk.do(op, in.NodeId, "", func(n *node, hit *Fault) syscall.Errno {
		if hit == nil {
			n.sync(in.FsyncFlags&fdatasyncFlag != 0)
			return 0
		}
		if hit.Lost {
			n.unsynced = nil
		}
		return hit.Err
	}))
}

func (f *front) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return f.look(in.NodeId, func(n *node) syscall.Errno {
		if !n.isDir() {
			return syscall.ENOTDIR
		}
		f.lastDir++
		out.Fh = f.lastDir
		f.list(n, out.Fh)
		return 0
	})
}

// list keeps what a reader of a directory is to see, so that what changes
// meanwhile moves nothing.
func (f *front) list(n *node, handle uint64) {
	l := []entry{{".", n.id, n.mode}, {"..", rootID, n.mode}}
	for name, id := range n.names {
		l = append(l, entry{name, id, f.disk.nodes[id].mode})
	}
	f.listings[handle] = l
}

func (f *front) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.look(in.NodeId, func(n *node) syscall.Errno {
		if in.Offset == 0 {
			f.list(n, in.Fh) // read anew after rewinddir
		}
		l := f.listings[in.Fh]
		for i := int(in.Offset); i < len(l); i++ {
			if !out.AddDirEntry(fuse.DirEntry{Name: l[i].name, Ino: l[i].id, Mode: l[i].mode, Off: uint64(i + 1)}) {
				break
			}
		}
		return 0
	})
}

func (f *front) ReleaseDir(in *fuse.ReleaseIn) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	delete(f.listings, in.Fh)
}

func (f *front) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (f *front) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	return f.look(in.NodeId, func(*node) syscall.Errno {
		if f.disk.readOnly && in.Mask&unix.W_OK != 0 {
			return syscall.EROFS
		}
		return 0
	})
}

func (f *front) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	const block, many = 4096, 1 << 20
	free := uint64(many)
	if f.disk.room >= 0 {
		free = uint64(f.disk.room) / block
	}
	*out = fuse.StatfsOut{Bsize: block, Frsize: block, Blocks: many, Bfree: free, Bavail: free, Files: many, Ffree: many, NameLen: 255}
	return fuse.OK
}
