// Package shim runs one VM: the process that is the parent of the VM's Cloud
// Hypervisor and of every virtiofsd that serves it, and the client by which
// the broker speaks to that process.
//
// Its laws:
//
//   - It decides nothing. It makes an object exist when told and ends it when
//     told, or by itself at the object's deadline, which needs no broker.
//   - All children die with it, even when it is killed: they are forked from
//     one thread that lives as long as the process and have a parent-death
//     signal. A child runs only after its number and start time are on record,
//     so that what survives in spite of that can be found and killed.
//   - A removal never waits for a put.
//   - An object is gone when every process that served it is gone, as its pidfd
//     says, and at the latest a cut deadline after the order, or five where
//     the guest is letting go meanwhile of objects that it was ordered to let
//     go of no later. Nothing else that the guest or the VMM does, or leaves
//     undone, delays that.
//   - What served an object is killed only at that deadline, since to kill it
//     under a guest that uses it breaks the guest's hot-plug for good. After a
//     kill the device's id and slot are not used again in this run of the VM.
//   - A run of the VM, an instance, ends with the VMM, and a guest's reboot ends
//     the VMM. No object passes from one instance to the next.
//   - A virtiofsd sees its share and nothing else: no other mount, process,
//     network or descriptor.
package shim
