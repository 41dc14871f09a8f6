// Package guest builds the initramfs of the Linux guest that the tests, the
// demo and the benchmarks boot: busybox, the few kernel modules that the
// devices need, spectrum-agent and a service that runs the tests' commands.
//
// Laws:
//   - The image depends on its inputs only: same files in, same bytes out.
//   - It is built to answer soon under software emulation: uncompressed, no
//     udev, modules in the order of their dependencies, those that nothing
//     waits for loaded last.
//   - It holds nothing secret. Whoever reaches its exec port is root in it.
package guest
