// Package execclient runs commands in the tests' guest, through the service
// that spectrum-test-exec keeps there: one connection a command, which dies
// with its connection.
package execclient
