package main

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers and sizes of struct kvm_regs, kvm_sregs and kvm_run on x86.
const (
	kvmSetMemory = 0x4020ae46
	kvmSetRegs   = 0x4090ae82
	kvmGetSregs  = 0x8138ae83
	kvmSetSregs  = 0x4138ae84

	exitReasonOffset = 8
	exitHLT          = 5
)

// program is, in real mode: mov ecx, 100000000; dec ecx; jnz to the dec; hlt.
var program = []byte{0x66, 0xb9, 0x00, 0xe1, 0xf5, 0x05, 0x66, 0x49, 0x75, 0xfc, 0xf4}

// execute runs the program and waits until it halts.
func execute(vm, cpu, runSize int) error {
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	copy(page, program)
	region := struct {
		slot, flags             uint32
		guest, size, userspaced uint64
	}{size: 4096, userspaced: uint64(uintptr(unsafe.Pointer(&page[0])))}
	if _, err := ioctl(vm, kvmSetMemory, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("cannot give a VM memory: %w", err)
	}
	run, err := unix.Mmap(cpu, 0, runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("cannot map a CPU's state: %w", err)
	}
	var sregs [312]byte
	if _, err := ioctl(cpu, kvmGetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("cannot read a CPU's registers: %w", err)
	}
	// The first segment is CS: base at 0, selector at 12.
	binary.LittleEndian.PutUint64(sregs[0:], 0)
	binary.LittleEndian.PutUint16(sregs[12:], 0)
	if _, err := ioctl(cpu, kvmSetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("cannot write a CPU's registers: %w", err)
	}
	var regs [144]byte
	binary.LittleEndian.PutUint64(regs[136:], 2) // RFLAGS: the bit that is always set; RIP is 0
	if _, err := ioctl(cpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs))); err != nil {
		return fmt.Errorf("cannot write a CPU's registers: %w", err)
	}
	if _, err := ioctl(cpu, kvmRun, 0); err != nil {
		return fmt.Errorf("cannot run a virtual CPU: %w", err)
	}
	if reason := binary.LittleEndian.Uint32(run[exitReasonOffset:]); reason != exitHLT {
		return fmt.Errorf("a virtual CPU stopped for reason %d instead of halting", reason)
	}
	return nil
}
