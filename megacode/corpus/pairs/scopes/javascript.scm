; inherits: ecma
(class_declaration name: (identifier) @name)
(class name: (identifier) @var)
(formal_parameters (identifier) @var)
