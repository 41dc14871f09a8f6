package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/vmm"
)

// Time-outs of calls to the VMM, before stretching.
const (
	addTimeout    = 15 * time.Second
	removeTimeout = 5 * time.Second
	infoTimeout   = time.Second
	retryPause    = 100 * time.Millisecond
	settlePause   = time.Second
)

// fsNoFile bounds the files and directories that a guest can make one
// virtiofsd hold.
const fsNoFile = 1 << 17

// fsNamespaces are made at the fork; the mount namespace is made later, by
// the launcher. In a PID namespace of its own, the proc that virtiofsd needs
// shows it no other process, through whose root it could reach another share.
const fsNamespaces = unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// object is one share on its way in, in place, or on its way out:
//
//	attaching ──▶ attached ──▶ detaching ──▶ gone
//	    └──────────────────────────┘
//
// One goroutine, serve, moves it. Fields above the line never change; those
// below are guarded by the server's mutex.
type object struct {
	instance *instance
	id       string
	segment  int
	inode    fileID
	end      chan struct{} // closed: end it
	up       chan struct{} // closed: attached, or it never will be
	done     chan struct{} // closed: gone

	once sync.Once

	spec   Object
	phase  string
	since  time.Time
	child  *child
	err    *Error
	killed bool // the guest held it past the deadline
	// retired: it ended under the guest; its id is not used again in this run.
	retired bool
}

type fileID struct {
	dev, ino uint64
	fileType uint32
}

func identify(f *os.File) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileID{}, err
	}
	return fileID{dev: st.Dev, ino: st.Ino, fileType: st.Mode & unix.S_IFMT}, nil
}

// deviceID is the VMM's name for the object's device.
func (o *object) deviceID() string { return "fs-" + o.id }

func (o *object) stop() { o.once.Do(func() { close(o.end) }) }

func (o *object) ending() bool {
	select {
	case <-o.end:
		return true
	case <-o.instance.over:
		return true
	default:
		return false
	}
}

// serve owns the object from its acceptance to its end. The slot is taken.
func (s *server) serve(o *object, f *os.File) {
	defer close(o.done)
	listener, err := s.launchFS(o, f)
	_ = f.Close()
	if err != nil {
		s.gone(o, refuse(CodeLaunch, "%v", err), slotFree)
		return
	}
	add := o.instance.calls.submit(false, s.spec.stretch(addTimeout), func(ctx context.Context) error {
		_, err := o.instance.api.AddFS(ctx, vmm.FSConfig{
			ID: o.deviceID(), Tag: o.spec.Tag, Socket: s.path(o.socket()),
			NumQueues: 1, QueueSize: 1024, PCISegment: o.segment,
		})
		return err
	})
	failpoint.Hit("shim.fs.adding")
	s.attach(o, add, listener)
	s.cut(o, add)
}

// attach waits for the device, or for a reason to give up.
func (s *server) attach(o *object, add *call, listener *os.File) {
	select {
	case <-add.done:
		_ = listener.Close()
		if add.err != nil {
			return
		}
		failpoint.Hit("shim.fs.added")
		s.update(func() {
			o.phase, o.since = Attached, s.clock.Now().Wall
			close(o.up)
		})
		select {
		case <-o.end:
		case <-o.instance.over:
		case <-o.child.exited:
		}
		return
	case <-o.end:
	case <-o.instance.over:
	case <-o.child.exited:
	}
	// The VMM may be connecting, or about to. Where virtiofsd is gone, nobody
	// would answer and the VMM would block for a minute: the shim answers, by
	// hanging up, until the call is over.
	o.instance.tasks.Go(func() {
		defer listener.Close()
		select {
		case <-add.done:
			return
		case <-add.queue.ended:
			return
		case <-o.child.exited:
		}
		if l, err := hangUp(listener); err == nil {
			_ = add.wait()
			_ = l.Close()
		}
	})
}

// What becomes of an object's slot.
const (
	slotFree    = iota // the device is not there
	slotPending        // the device may be there yet: free it when it is not
	slotRetired        // never again in this instance
)

// cut ends an object whose add call was submitted: the device first while
// virtiofsd lives, so that an honest guest drains and lets go, and whatever
// is left at the deadline by force.
func (s *server) cut(o *object, add *call) {
	if add.cancel() {
		// The VMM has never heard of it.
		o.child.kill()
		<-o.child.exited
		why := o.reason()
		if !isClosed(o.end) && isClosed(o.instance.over) {
			why = refuse(CodeNotRunning, "the VM has ended")
		}
		s.gone(o, why, slotFree)
		return
	}
	ordered := time.Now()
	deadline := time.NewTimer(s.spec.stretch(s.spec.CutDeadline))
	defer deadline.Stop()
	s.update(func() {
		o.phase, o.since = Detaching, s.clock.Now().Wall
	})
	failpoint.Hit("shim.fs.removing")
	crashed := o.child.hasExited() && !o.ending()
	var late bool
	if select2(add.done, o.instance.over, deadline.C) == timedOut {
		late = true
	}
	if refused := definite(add); refused != nil && !late {
		if crashed {
			refused = refuse(CodeLaunch, "virtiofsd of %s ended at once: %s", o.id, lastLine(o.log()))
		}
		o.child.kill() // it waits for a connection that will not come
		<-o.child.exited
		s.gone(o, refused, slotFree)
		return
	}
	if !late {
		stop := make(chan struct{})
		removing := s.removeDevice(o, stop)
		late = s.holds(o, ordered, deadline)
		close(stop)
		<-removing
	}
	failpoint.Hit("shim.fs.let.go")
	killed := late && !o.child.hasExited()
	o.child.kill()
	<-o.child.exited
	switch {
	case isClosed(o.instance.over):
		s.gone(o, refuse(CodeNotRunning, "the VM has ended"), slotRetired)
	case killed:
		s.update(func() { o.killed, o.retired = true, true })
		s.degrade("the guest held %s (tag %s) past the deadline: what served it was killed, its slot on segment %d is retired", o.id, o.spec.Tag, o.segment)
		s.gone(o, o.reason(), slotRetired)
	case crashed:
		s.crashed(o)
	case !o.ending():
		// Nobody asked for its end: the VMM's answer was lost.
		if s.ended(o.instance) {
			s.gone(o, refuse(CodeNotRunning, "the VM has ended"), slotRetired)
			return
		}
		s.gone(o, refuse(CodeVMM, "%v", add.err), s.deviceLeft(o))
	default:
		s.progress(o.instance, ordered)
		s.gone(o, o.reason(), s.deviceLeft(o))
	}
}

// patience is how many cut deadlines a guest may take that lets go of one
// object after another.
const patience = 5

// together is how far apart removals are ordered that count as one order.
const together = 100 * time.Millisecond

// progress notes that the guest let go of an object that it was told to let go
// of then, and forgets what can lengthen no deadline any more.
func (s *server) progress(i *instance, ordered time.Time) {
	now := time.Now()
	s.update(func() {
		i.letGo = slices.DeleteFunc(i.letGo, func(l letGo) bool {
			return now.Sub(l.at) > s.spec.stretch(s.spec.CutDeadline)
		})
		i.letGo = append(i.letGo, letGo{ordered, now})
	})
}

// lastProgress is when the guest last let go of an object that it was told to
// let go of by then. What it is told later does not count: a guest that goes on
// requesting and dropping must not lengthen what was ordered before.
func (i *instance) lastProgress(by time.Time) (last time.Time) {
	for _, l := range i.letGo {
		if !l.ordered.After(by) && l.at.After(last) {
			last = l.at
		}
	}
	return last
}

// holds waits until the guest has let go of an object, and tells whether it
// still holds it at the deadline. A guest ejects one device after another, so
// that of many it may need longer: while it goes on letting go of those that
// were ordered with this one or before, and was never caught holding one, the
// deadline counts from the last of them.
func (s *server) holds(o *object, ordered time.Time, deadline *time.Timer) bool {
	limit := s.spec.stretch(s.spec.CutDeadline)
	last := ordered.Add(patience * limit)
	for {
		if select2(o.child.exited, o.instance.over, deadline.C) != timedOut {
			return false
		}
		s.mu.Lock()
		next := o.instance.lastProgress(ordered.Add(together)).Add(limit)
		honest := len(s.degraded) == 0
		s.mu.Unlock()
		if next.After(last) {
			next = last
		}
		wait := time.Until(next)
		if !honest || wait <= 0 {
			return true
		}
		deadline.Reset(wait)
	}
}

// crashed ends an object whose virtiofsd ended unasked: the guest ejected the
// device, which is its right, or virtiofsd failed, which may have wedged the
// guest's hot-plug.
func (s *server) crashed(o *object) {
	if s.deviceLeft(o) == slotFree {
		s.gone(o, refuse(CodeRemoved, "the guest ejected %s", o.id), slotFree)
		return
	}
	if s.ended(o.instance) {
		s.gone(o, refuse(CodeNotRunning, "the VM has ended"), slotRetired)
		return
	}
	s.update(func() { o.retired = true })
	s.degrade("virtiofsd of %s (tag %s) ended by itself (%s): its slot on segment %d is retired",
		o.id, o.spec.Tag, describeStatus(o.child.status), o.segment)
	s.gone(o, refuse(CodeLaunch, "virtiofsd of %s ended by itself: %s", o.id, lastLine(o.log())), slotRetired)
}

// ended tells whether a run is over, or just about to be: a VMM that ends lets go
// of its sockets before anybody sees its end.
func (s *server) ended(i *instance) bool {
	if i.vmm.hasExited() || await(i.over, s.spec.stretch(infoTimeout)) {
		<-i.over
		return true
	}
	return false
}

type outcome int

const (
	happened outcome = iota
	over
	timedOut
)

// select2 waits for the first of an event, the instance's end and a deadline.
func select2(event, instanceOver <-chan struct{}, deadline <-chan time.Time) outcome {
	select {
	case <-event:
		return happened
	case <-instanceOver:
		return over
	case <-deadline:
		return timedOut
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// definite is the VMM's own refusal of an add call. Any other failure leaves
// open whether the device exists.
func definite(add *call) *Error {
	if !isClosed(add.done) || add.err == nil {
		return nil
	}
	var answered *vmm.Error
	switch {
	case errors.Is(add.err, vmm.ErrNoSlot):
		return refuse(CodeNoSlots, "%v", add.err)
	case errors.As(add.err, &answered):
		return refuse(CodeVMM, "%v", add.err)
	}
	return nil
}

// removeDevice tells the VMM, again while it fails, until stop.
func (s *server) removeDevice(o *object, stop <-chan struct{}) <-chan struct{} {
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		for {
			c := o.instance.calls.submit(true, s.spec.stretch(removeTimeout), func(ctx context.Context) error {
				return o.instance.api.RemoveDevice(ctx, o.deviceID())
			})
			select {
			case <-c.done:
				if c.err == nil || errors.Is(c.err, vmm.ErrNotFound) {
					return
				}
				s.log.Warn("cannot remove a device", "object", o.id, "error", c.err)
			case <-stop:
				return
			}
			select {
			case <-time.After(retryPause):
			case <-stop:
				return
			}
		}
	}()
	return finished
}

// deviceLeft asks the VMM whether the device is gone. It takes a moment at
// most; where there is no answer the slot stays taken until there is one.
func (s *server) deviceLeft(o *object) int {
	present, err := s.hasDevice(o)
	if err == nil && !present {
		return slotFree
	}
	return slotPending
}

func (s *server) hasDevice(o *object) (bool, error) {
	timeout := s.spec.stretch(infoTimeout)
	present := true
	c := o.instance.calls.submit(true, timeout, func(ctx context.Context) error {
		info, err := o.instance.api.Info(ctx)
		if err == nil {
			_, present = info.DeviceTree[o.deviceID()]
		}
		return err
	})
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	if select2(c.done, o.instance.over, timer.C) != happened {
		c.cancel()
		return true, errors.New("the VMM does not answer")
	}
	return present, c.err
}

// settle frees the slot of a device once the VMM no longer has it.
func (s *server) settle(o *object) {
	for {
		select {
		case <-time.After(settlePause):
		case <-o.instance.over:
			return
		}
		if present, err := s.hasDevice(o); err == nil && !present {
			s.update(func() { o.instance.slots.give(o.segment) })
			return
		}
	}
}

// reason says why an object that nobody's failure ended is no more.
func (o *object) reason() *Error {
	return refuse(CodeRemoved, "%s was removed", o.id)
}

// gone is the last thing that happens to an object. Whoever waits for it to be
// up learns why it will not be.
func (s *server) gone(o *object, err *Error, slot int) {
	failpoint.Hit("shim.fs.gone")
	_ = os.Remove(o.socket())
	if err.Code == CodeRemoved || err.Code == CodeNotRunning {
		_ = os.Remove(o.log()) // nothing failed that it could explain
	}
	s.update(func() {
		o.phase, o.since = Gone, s.clock.Now().Wall
		o.err = err
		if !isClosed(o.up) {
			close(o.up)
		}
		if slot == slotFree {
			o.instance.slots.give(o.segment)
		}
		if !o.retired {
			delete(s.objects, o.id)
		}
		s.buried.put(o.id, o.spec.Generation)
	})
	if slot == slotPending {
		o.instance.tasks.Go(func() { s.settle(o) })
	}
	s.log.Info("object is gone", "object", o.id, "killed", o.killed, "reason", err.Message)
}

// Paths of an object, in the runtime directory, which is the working directory.
func (o *object) socket() string { return filepath.Join(fsDirName, o.id+".sock") }
func (o *object) log() string    { return filepath.Join(fsDirName, o.id+".log") }

// launchFS binds the socket and starts virtiofsd on it. The listener stays
// open here too, until the VMM has connected.
func (s *server) launchFS(o *object, share *os.File) (*os.File, error) {
	listener, err := listenAt(o.socket())
	if err != nil {
		return nil, err
	}
	failpoint.Hit("shim.fs.listening")
	c, err := s.launchOn(o, share, listener)
	if err != nil {
		_ = listener.Close()
		return nil, err
	}
	failpoint.Hit("shim.fs.started")
	s.update(func() { o.child = c })
	return listener, nil
}

// listenAt makes a blocking listener, as virtiofsd expects it.
func listenAt(path string) (*os.File, error) {
	_ = os.Remove(path)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err == nil {
		err = unix.Listen(fd, 1)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	return f, nil
}

// hangUp answers whoever connects, by closing, until the listener is closed.
func hangUp(f *os.File) (*net.UnixListener, error) {
	if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
		return nil, err
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	go func() {
		for {
			conn, err := u.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	return u, nil
}

func (s *server) launchOn(o *object, share, listener *os.File) (*child, error) {
	binary, err := os.Open(s.spec.Virtiofsd)
	if err != nil {
		return nil, err
	}
	defer binary.Close()
	return s.spawner.start(&launchOrder{
		role: "fs/" + o.id,
		spec: launchSpec{
			FS: true, Argv: fsArgv(s.spec.Virtiofsd, &o.spec), ReadOnly: o.spec.ReadOnly,
			SingleFile: o.spec.SingleFile, NoFile: fsNoFile,
		},
		files: []*os.File{share, listener, binary},
		log:   o.log(),
		flags: fsNamespaces,
	})
}

// fsArgv is virtiofsd's command line in its root. File handles stay off, since
// they need a capability that reaches past the share; extended attributes stay
// off, and with them file capabilities.
func fsArgv(path string, o *Object) []string {
	everyone := strconv.FormatUint(1<<32-1, 10)
	argv := []string{
		path, "--fd=" + strconv.Itoa(controlFD), "--shared-dir=/" + shareAt,
		"--sandbox=chroot", "--seccomp=kill", "--inode-file-handles=never",
		"--modcaps=-fsetid:-mknod:-setfcap", "--rlimit-nofile=0", "--log-level=error",
		fmt.Sprintf("--translate-uid=squash-guest:0:%d:%s", o.UID, everyone),
		fmt.Sprintf("--translate-gid=squash-guest:0:%d:%s", o.GID, everyone),
	}
	if o.ReadOnly {
		argv = append(argv, "--readonly")
	}
	return argv
}
