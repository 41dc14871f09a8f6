// Command standin takes Cloud Hypervisor's command line, speaks its
// API and drives QEMU's software emulation, so that real Linux guests see real
// devices come and go on machines without hardware virtualisation. virtiofsd
// and the vhost-user vsock are the real ones. Nothing outside of test/ knows
// that it exists; test/contract holds it and Cloud Hypervisor to the same
// answers.
//
// # What it does as Cloud Hypervisor does
//
//   - One call is served at a time, vmm.ping included. A guest that ends has
//     its turn like a call.
//   - Errors are a JSON array of causes, outermost first, with the same words
//     and statuses: 400 bad configuration, 404 unknown device or no VM, 409
//     identifier taken, 500 everything else.
//   - vm.add-fs to a socket that nobody listens on retries for 60 s, and with
//     it blocks every other call. It connects before it looks for a slot: on a
//     full segment the backend sees a connection that ends.
//   - A segment has 32 device numbers, of which its host bridge takes one. On
//     segment 0 the random number generator, the console, the vsock and the
//     disks take theirs; a 29th file system there may be the last.
//   - vm.remove-device answers 204 at once and takes the device out of the
//     configuration; asked again it answers 204 again. The id stays in the
//     device tree until the guest ejects it. Then the backend's connection is
//     closed, so that virtiofsd exits, and device-removed is said. A paused
//     guest, or one without the driver, never ejects. An id that was removed
//     and is not ejected cannot be used again.
//   - A guest's reboot is said as rebooting, then every process and connection
//     of the guest ends, then a fresh one boots from the same configuration,
//     then rebooted is said. The configuration still lists file systems that
//     were plugged in: with their backends gone, the API blocks for 60 s and
//     the process exits with code 1. rebooted is never said.
//   - A guest that powers off ends the process with code 0, after shutdown,
//     deleted and the VMM's own shutdown were said; with --no-shutdown, only
//     the guest ends.
//   - A connection to the guest waits until the guest's driver runs the vsock.
//   - A vsock path that exists is an error; on a clean end it is removed. After
//     SIGKILL it stays.
//   - Paths in the configuration are opened by this process, so
//     /proc/self/fd/N means a descriptor that it inherited.
//   - An event is one indented JSON object and an empty line; a write that
//     would block is dropped.
//
// # Where it differs
//
//   - The guest sees a bridge for each PCI segment (QEMU has no segments), so
//     a device's address there is not the bdf that the API told. Guests find
//     file systems by tag.
//   - The serial port is at ttyS0; the console device exists only where its
//     mode leads somewhere.
//   - At most 10 PCI segments.
//   - vm.add-net, vm.add-disk, resizing, VFIO, and migration are not served:
//     404. A snapshot of a VM that has a virtio-fs device is refused.
//   - vm.pause stops all of QEMU with SIGSTOP, since its own way of stopping can
//     make a vhost-user backend deaf. vm.remove-device of a paused guest is
//     told to QEMU at vm.resume; vm.add-fs lets the guest run for an instant.
//   - QEMU cannot save a machine with a vhost-user device: vm.snapshot lets the
//     paused guest run for the instant in which its vsock is ejected, and plugs
//     it in again. Listeners in the guest survive, connections do not.
//   - state.json names the kernel instead of describing devices, and
//     memory-ranges is QEMU's own format. A clone is made in the same way:
//     link or copy the files, rewrite the paths in config.json, vm.restore.
//   - An uncompressed ELF kernel boots at once; a bzImage is unpacked by the
//     emulated processor, which takes seconds.
//   - Landlock and seccomp options are accepted and do nothing.
//
// QEMU and the vsock device die with this process, however it dies.
package main
