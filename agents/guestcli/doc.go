// Package guestcli is spectrum-agent's command line: for people and programs
// inside a VM, who ask the broker for what this VM may have.
//
// Laws:
//   - The broker knows which VM asks by the channel; nothing here says it.
//   - A token is printed or written only where that was asked for, never
//     taken from the command line, where every process could read it.
//   - Exit codes are those of spectrum-cap.
package guestcli
