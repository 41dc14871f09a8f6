// Package vmm speaks to Cloud Hypervisor: one VMM, one UNIX socket, one VM.
//
// Its laws:
//
//   - Whoever reaches the socket owns the VM. The package only dials the path
//     it was given and never makes, moves or shares it.
//   - Cloud Hypervisor serves one request at a time, so a [Client] sends one at
//     a time. A caller that waits for its turn, or for an answer, stops at its
//     context's deadline; the VMM may still carry out what it was told, and
//     the caller has to look ([Client.Info]) before it assumes anything.
//   - vm.add-fs with a socket nobody listens on blocks every call to that VMM
//     for 60 s. The package cannot prevent it: bind and listen first.
//   - vm.remove-device answers before anything is removed. Only the exit of
//     the device's backend and the id's absence from the device tree prove it.
//   - An error that the VMM answered is an *[Error]; anything else means that
//     the outcome is unknown.
//   - What the VMM writes is bounded and parsed strictly where it decides
//     something: answers to 4 MiB, events to 64 KiB each.
//
// The calls are described in openapi.yaml, which is written by hand, and the
// code in chapi is generated from it. test/contract holds a client against a
// live VMM.
package vmm

//go:generate go tool -modfile=../tools/go.mod oapi-codegen -config oapi-codegen.yaml openapi.yaml
