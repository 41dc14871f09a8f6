// Command havekvm exits with 0 if a virtual CPU runs here at a CPU's speed. A
// /dev/kvm that merely exists does not promise that: inside some virtual
// machines KVM interprets instruction by instruction, and no guest ever boots.
package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Numbers of the KVM API, Documentation/virt/kvm/api.rst.
const (
	kvmGetAPIVersion = 0xae00
	kvmCreateVM      = 0xae01
	kvmGetMmapSize   = 0xae04
	kvmCreateVCPU    = 0xae41
	kvmRun           = 0xae80
	kvmAPIVersion    = 12
)

// patience is how long the probe's loop may take: some fifty times what a CPU
// needs, and a fraction of what an interpreter does.
const patience = 2 * time.Second

func main() {
	done := make(chan error, 1)
	// A CPU that hangs holds this thread for good; the program's end frees it.
	go func() { done <- probe() }()
	err := errors.New("a virtual CPU does not run, or not at a CPU's speed")
	select {
	case err = <-done:
	case <-time.After(patience):
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "no hardware virtualisation:", err)
		os.Exit(1)
	}
}

func probe() error {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open /dev/kvm: %w", err)
	}
	defer unix.Close(kvm)
	version, err := ioctl(kvm, kvmGetAPIVersion, 0)
	if err != nil {
		return fmt.Errorf("cannot ask for KVM's version: %w", err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("KVM has API version %d, not %d", version, kvmAPIVersion)
	}
	size, err := ioctl(kvm, kvmGetMmapSize, 0)
	if err != nil {
		return fmt.Errorf("cannot ask for a CPU's state: %w", err)
	}
	vm, err := ioctl(kvm, kvmCreateVM, 0)
	if err != nil {
		return fmt.Errorf("cannot make a VM: %w", err)
	}
	defer unix.Close(vm)
	cpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fmt.Errorf("cannot make a virtual CPU: %w", err)
	}
	defer unix.Close(cpu)
	return execute(vm, cpu, size)
}

func ioctl(fd int, request uint, arg uintptr) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), arg)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
