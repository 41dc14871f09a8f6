// Package failpoint marks the steps at which a program may be killed, so that
// a test can kill it at exactly that step.
//
// Its laws: a label is a string literal that occurs once in the sources, so
// that it names one place; it is spelt component.step[.before|.after], in
// lower case; and without the build tag "failpoints" nothing of it is left in
// a program, neither a label nor the code that would read one. The package
// imports nothing of ours and may be called from anywhere, also between a fork
// and an exec.
package failpoint
