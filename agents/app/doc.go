// Package app is the agent of an application VM: it mounts what the broker
// plugs in at [wire.MountRoot], removes it, and says that it is well.
//
// Laws:
//   - Only the host (CID 2) may ask for anything: a process in the guest that
//     reaches the port is turned away.
//   - The agent owns the directories beneath [wire.MountRoot] and nothing
//     else. It never makes a mount with set-id programs or device nodes.
//   - Asking twice is asking once: the same mount again is a success, another
//     one under the same label a conflict.
//   - A mount whose device has gone is removed without anyone asking, so that
//     after a revocation the directory is gone too.
//   - Nothing depends on the agent for access to end.
package app
