package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/vmm"
)

// instance is one run of the VM, from a VMM's start to its end.
type instance struct {
	id    string
	api   *vmm.Client
	calls *calls
	over  chan struct{} // closed: the VMM is dead
	slots *slots        // guarded by the server's mutex
	letGo []letGo       // what the guest let go of lately; likewise
	vmm   *child
	tasks sync.WaitGroup // objects, and slots to be freed
}

// letGo is an object that the guest let go of: when it was told to, and when it
// did.
type letGo struct{ ordered, at time.Time }

// Time-outs and pauses of a VM, before stretching.
const (
	apiTimeout   = 20 * time.Second
	bootTimeout  = 60 * time.Second
	haltTimeout  = 5 * time.Second
	launchLimit  = 10 * time.Second
	pollPause    = 10 * time.Millisecond
	restartPause = time.Second
	lingerTime   = 5 * time.Second
	tellTime     = 50 * time.Millisecond
)

// ending says how an instance ended.
type ending struct {
	reboot bool
	reason string
}

// runVM runs instance after instance: a guest that reboots gets a fresh VMM,
// since the old one's configuration still names devices whose virtiofsd is
// gone, and would die of it.
func (s *server) runVM(ctx context.Context) {
	defer close(s.finished)
	for {
		begun := time.Now()
		end := s.runInstance(ctx)
		if !end.reboot || isClosed(s.stopping) {
			s.update(func() { s.phase, s.reason = Stopped, end.reason })
			s.log.Info("VM has ended", "reason", end.reason)
			return
		}
		s.log.Info("guest reboots: fresh VMM")
		s.update(func() { s.phase, s.reason = Starting, "" })
		// A guest that reboots at once and always may not keep the host busy.
		select {
		case <-time.After(max(0, restartPause-time.Since(begun))):
		case <-s.stopping:
		}
	}
}

// runInstance returns when the VMM and all that served it are gone.
func (s *server) runInstance(ctx context.Context) ending {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	i := &instance{
		id: uuid.NewString(), over: make(chan struct{}),
		api:   vmm.NewClient(s.path(vmmSockName)),
		slots: newSlots(s.spec.Segments, len(s.spec.Disks)),
	}
	i.calls = newCalls(ctx)
	s.update(func() {
		s.instance, s.objects = i, map[string]*object{}
		s.buried, s.degraded = newGraveyard(), nil
	})
	events, err := s.startVMM(i)
	if err != nil {
		cancel()
		<-i.calls.ended
		return ending{reason: err.Error()}
	}
	var readers sync.WaitGroup
	halted := make(chan vmm.EventName, 1)
	readers.Go(func() { s.readEvents(events, halted) })
	readers.Go(func() { s.console.follow(ctx, s.path(serialName)) })

	end := s.live(ctx, i, halted)
	i.vmm.kill()
	<-i.vmm.exited
	failpoint.Hit("shim.vmm.ended")
	s.mu.Lock() // no put may be accepted any more
	if s.phase == Running {
		s.phase = Stopping
	}
	close(i.over)
	s.bump()
	s.mu.Unlock()
	cancel()
	i.tasks.Wait() // nothing is started any more
	<-i.calls.ended
	// A VMM may have children of its own, which must not meet the next one.
	if s.cgroup != nil {
		if err := s.renewCgroup(); err != nil {
			return ending{reason: fmt.Sprintf("cannot end what the VMM left: %v", err)}
		}
	}
	failpoint.Hit("shim.vm.ended")
	_ = events.Close()
	readers.Wait()
	return end
}

func (s *server) renewCgroup() error {
	leaf, err := s.cgroup.renew(cgroupChildren)
	if err != nil {
		return err
	}
	_ = s.spawner.cgroup.Close()
	s.spawner.cgroup = leaf
	return nil
}

// live boots the VM and waits for whatever ends it.
func (s *server) live(ctx context.Context, i *instance, halted <-chan vmm.EventName) ending {
	bootCtx, cancel := context.WithTimeout(ctx, s.spec.stretch(bootTimeout))
	defer cancel()
	booted := make(chan error, 1)
	go func() { booted <- s.bootVM(bootCtx, i) }()
	select {
	case err := <-booted:
		if err != nil {
			return ending{reason: fmt.Sprintf("cannot boot: %v: %s", err, lastLine(vmmLogName))}
		}
	case <-i.vmm.exited:
		return ending{reason: s.exitReason(i)}
	case <-s.stopping:
		return ending{reason: "stopped while starting"}
	}
	failpoint.Hit("shim.vm.booted")
	s.update(func() { s.phase = Running })
	s.log.Info("VM runs", "instance", i.id, "vmm", i.vmm.PID)
	for {
		select {
		case <-i.vmm.exited:
			return ending{reason: s.exitReason(i)}
		case name := <-halted:
			if name == vmm.EventRebooting || name == vmm.EventRebooted {
				return ending{reboot: true, reason: "the guest rebooted"}
			}
			await(i.vmm.exited, s.spec.stretch(haltTimeout))
			return ending{reason: "the guest shut down"}
		case <-s.stopping:
			return s.powerOff(i)
		}
	}
}

// powerOff presses the button and waits for the grace to pass.
func (s *server) powerOff(i *instance) ending {
	s.mu.Lock()
	s.phase = Stopping
	grace := s.grace
	s.bump()
	s.mu.Unlock()
	if grace > 0 {
		i.calls.submit(true, min(grace, s.spec.stretch(removeTimeout)), i.api.PowerButton)
		if await(i.vmm.exited, grace) {
			return ending{reason: "stopped"}
		}
	}
	return ending{reason: "stopped by force"}
}

// await tells whether the event came in time.
func await(event <-chan struct{}, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-event:
		return true
	case <-timer.C:
		return false
	}
}

func (s *server) exitReason(i *instance) string {
	<-i.vmm.exited
	if i.vmm.status.Exited() && i.vmm.status.ExitStatus() == 0 {
		return "the guest shut down"
	}
	return fmt.Sprintf("the VMM ended: %s: %s", describeStatus(i.vmm.status), lastLine(vmmLogName))
}

func describeStatus(st syscall.WaitStatus) string {
	if st.Signaled() {
		return st.Signal().String()
	}
	return "exit status " + strconv.Itoa(st.ExitStatus())
}

// startVMM starts Cloud Hypervisor with the boot files and the writing end of
// its event stream as inherited descriptors.
func (s *server) startVMM(i *instance) (events *os.File, _ error) {
	// Left over from the instance before. The vsock listeners of the broker
	// (vsock.sock_219) are not ours and stay.
	for _, name := range []string{vmmSockName, vsockName, serialName} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	events, eventsW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer eventsW.Close()
	c, err := s.spawner.start(&launchOrder{
		role: "vmm",
		spec: launchSpec{Argv: []string{
			s.spec.VMM, "--api-socket", "path=" + s.path(vmmSockName), "--event-monitor", "fd=" + strconv.Itoa(payloadFD),
		}},
		files: append([]*os.File{eventsW}, s.boot...),
		log:   vmmLogName,
	})
	if err != nil {
		_ = events.Close()
		return nil, err
	}
	failpoint.Hit("shim.vmm.started")
	s.update(func() { i.vmm = c })
	return events, nil
}

// bootVM waits for the VMM, gives it the VM's configuration and boots it.
func (s *server) bootVM(ctx context.Context, i *instance) error {
	pingCtx, cancel := context.WithTimeout(ctx, s.spec.stretch(apiTimeout))
	defer cancel()
	for {
		_, err := i.api.Ping(pingCtx)
		if err == nil {
			break
		}
		select {
		case <-time.After(pollPause):
		case <-pingCtx.Done():
			return fmt.Errorf("the VMM does not answer: %w", err)
		}
	}
	if err := i.api.Create(ctx, s.vmConfig()); err != nil {
		return err
	}
	failpoint.Hit("shim.vm.created")
	if err := i.api.Boot(ctx); err != nil {
		return err
	}
	// The socket owns the VM; the directory is private already.
	return os.Chmod(vmmSockName, 0o600)
}

// guestCID is the same for all VMs: hybrid vsock tells them apart by path.
const guestCID = 3

func (s *server) vmConfig() vmm.VMConfig {
	fd := payloadFD + 1
	next := func() string {
		fd++
		return fmt.Sprintf("/proc/self/fd/%d", fd-1)
	}
	c := vmm.VMConfig{
		Cpus:     vmm.CPUsConfig{BootVCPUs: s.spec.VCPUs, MaxVCPUs: s.spec.VCPUs},
		Memory:   vmm.MemoryConfig{Size: int64(s.spec.MemoryMiB) << 20, Shared: true},
		Payload:  vmm.PayloadConfig{Kernel: next(), Cmdline: s.spec.Cmdline},
		Platform: vmm.PlatformConfig{NumPCISegments: s.spec.Segments},
		RNG:      vmm.RNGConfig{Src: "/dev/urandom"},
		Vsock:    vmm.VsockConfig{CID: guestCID, Socket: s.path(vsockName)},
		Serial:   vmm.ConsoleConfig{Mode: vmm.ConsoleSocket, Socket: s.path(serialName)},
		Console:  vmm.ConsoleConfig{Mode: vmm.ConsoleOff},
	}
	if s.spec.Initrd {
		c.Payload.Initramfs = next()
	}
	for _, d := range s.spec.Disks {
		c.Disks = append(c.Disks, vmm.DiskConfig{Path: next(), ReadOnly: d.ReadOnly, ImageType: vmm.ImageRaw})
	}
	return c
}

// readEvents passes on the first event that ends the instance, and reads on,
// so that the VMM never waits for a reader.
func (s *server) readEvents(f *os.File, halted chan<- vmm.EventName) {
	events := vmm.NewEvents(f)
	for {
		e, err := events.Next()
		if err != nil {
			return
		}
		switch e.EventName {
		case vmm.EventRebooting, vmm.EventRebooted, vmm.EventShutdown, vmm.EventDeleted:
			select {
			case halted <- e.EventName:
			default:
			}
		}
	}
}
